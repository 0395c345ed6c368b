"""Hold answers against the OpenAPI document: status, content type, headers and the schema of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx
from jsonschema import Draft202012Validator
from starlette.routing import Route

from triptych.api.app import ROUTES

HANGED_UP = 499
"""Nobody reads that answer."""


class Contract:
    """The promises of an OpenAPI document."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self._validators: dict[str, Draft202012Validator] = {}

    async def check(self, response: httpx.Response) -> None:
        """A hook of httpx: fail where an answer of a documented operation is not as the document says."""
        operation = self._operation(response.request)
        if operation is None or response.status_code == HANGED_UP:
            return
        what = f"{response.request.method} {response.request.url.path}: {response.status_code}"
        promised = operation["responses"].get(str(response.status_code))
        assert promised, f"{what} is not in the document"
        missing = [
            name for name, header in promised["headers"].items() if header["required"] and name not in response.headers
        ]
        assert not missing, f"{what} lacks {missing}"
        content = promised.get("content", {})
        media = response.headers.get("content-type", "").partition(";")[0]
        assert media in content if content else not media, f"{what} is {media}, not one of {[*content]}"
        if media == "application/json":
            await response.aread()
            self._validator(content[media]["schema"]["$ref"]).validate(response.json())

    def _operation(self, request: httpx.Request) -> Mapping[str, Any] | None:
        """The operation of a request; None of what has none: other paths, methods that are not allowed."""
        for route in ROUTES:
            if isinstance(route, Route) and route.path_regex.match(request.url.path):
                of_path = self.document["paths"].get(route.path_format, {})
                found: Mapping[str, Any] | None = of_path.get(request.method.lower())
                return found
        return None

    def _validator(self, reference: str) -> Draft202012Validator:
        if reference not in self._validators:
            schema = {"$ref": reference, "components": self.document["components"]}
            self._validators[reference] = Draft202012Validator(schema)
        return self._validators[reference]
