"""Map parameters to the field names a client sent, so that errors name its fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from triptych.api.errors import ApiError, field_error
from triptych.roles.messages.requests import RequestRejected

_STATUS: Final = {"invalid": 422, "full": 429, "conflict": 409, "unavailable": 503, "model_not_found": 404}


class FieldNames:
    """Parameters by what the client sent for them; a parameter that has no other name goes by its own."""

    def __init__(self, usual: Mapping[str, str] | None = None) -> None:
        self._fields = dict(usual or {})
        self._subjects: dict[str, str] = {}

    def learn(self, parameter: str, field: str, subject: str = "") -> None:
        """Note that `field` stands for `parameter`; a sentence about it begins with `subject`, by default the field."""
        self._fields[parameter] = field
        if subject:
            self._subjects[parameter] = subject

    def field(self, parameter: str) -> str:
        """Return the field that stands for a parameter."""
        return self._fields.get(parameter, parameter)

    def invalid(self, parameter: str, predicate: str) -> ApiError:
        """Make a 422 about a parameter; see `api.errors.field_error`."""
        return field_error(self.field(parameter), predicate, subject=self._subjects.get(parameter, ""))

    def rejected(self, rejected: RequestRejected) -> ApiError:
        """Say in HTTP what the head's refusal means."""
        if rejected.code == "invalid" and rejected.param:
            return self.invalid(rejected.param, rejected.message)
        return ApiError(
            _STATUS.get(rejected.code, 500),
            rejected.message,
            code="invalid_value" if rejected.code == "invalid" else rejected.code,
            param=self.field(rejected.param) if rejected.param else None,
            retry_after_s=rejected.retry_after_s,
        )
