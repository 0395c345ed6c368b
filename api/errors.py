"""Every error in OpenAI's shape, mapped in one place: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
import re
from http import HTTPStatus

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.types import ExceptionHandler

from api.encoding import JSONResponse
from bus import AskTimeout, BusError, MailboxFull, MessageTooLong, RemoteFailure, Unreachable
from roles.messages.requests import RequestRejected

log = structlog.stdlib.get_logger("api")

CLIENT_CLOSED_REQUEST = 499
"""Nobody reads this answer; the access log does. nginx's number for it."""

_REJECTIONS = {"invalid": 422, "full": 429, "conflict": 409, "unavailable": 503}
_FIELD = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_MISSING = re.compile(r"missing required field `(?P<name>[^`]+)`")


class ApiError(Exception):
    """An answer with an error status."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.headers: dict[str, str] = {}


def invalid(param: str, message: str) -> ApiError:
    """Make a 422 that names the field."""
    return ApiError(422, message, code="invalid_value", param=param)


def not_found(message: str, code: str = "not_found") -> ApiError:
    """Make a 404."""
    return ApiError(404, message, code=code)


def from_validation(error: msgspec.ValidationError) -> ApiError:
    """Make a 422 whose `param` is the field that msgspec points at, None if it is the whole body."""
    text = str(error)
    missing = _MISSING.search(text)
    if missing:
        return invalid(missing["name"], f"{missing['name']} is required")
    field = _FIELD.search(text)
    path = field["path"] if field else ""
    return ApiError(422, text, code="invalid_value", param=path or None)


def from_rejection(rejected: RequestRejected) -> ApiError:
    """Say in HTTP what the head's refusal means."""
    return ApiError(
        _REJECTIONS.get(rejected.code, 500),
        rejected.message,
        code="invalid_value" if rejected.code == "invalid" else rejected.code,
        param=rejected.param or None,
        retry_after_s=rejected.retry_after_s or (1.0 if rejected.code in ("full", "unavailable") else 0.0),
    )


def from_bus(error: BusError) -> ApiError:
    """Say in HTTP what trouble on the way to the head means."""
    match error:
        case MailboxFull():
            return ApiError(429, "the head has too much mail: try again", code="full", retry_after_s=1.0)
        case MessageTooLong():
            return ApiError(413, "the request is too long for a message to the head", code="too_long")
        case AskTimeout() | Unreachable():
            message = "the head does not answer: it may be restarting, try again"
            return ApiError(503, message, code="head_unreachable", retry_after_s=1.0)
        case RemoteFailure(code="not_found"):
            return not_found(error.detail)
        case RemoteFailure(code="stopping" | "deadline_exceeded" | "stale_generation"):
            message = f"the head did not take the message ({error.code}): try again"
            return ApiError(503, message, code="unavailable", retry_after_s=1.0)
        case _:
            return ApiError(500, "the head failed on this request", code="internal_error")


def from_http(error: HTTPException) -> ApiError:
    """Map Starlette's own errors: no such route, method not allowed."""
    phrase = HTTPStatus(error.status_code).phrase
    mapped = ApiError(error.status_code, error.detail, code=phrase.lower().replace(" ", "_"))
    mapped.headers.update(error.headers or {})
    return mapped


def error_type(status: int) -> str:
    """Return OpenAI's word for the class of error."""
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"


def respond(error: ApiError) -> JSONResponse:
    """Make the response."""
    headers = dict(error.headers)
    if error.retry_after_s > 0:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    body = {
        "message": error.message,
        "type": error_type(error.status),
        "param": error.param,
        "code": error.code,
    }
    return JSONResponse({"error": body}, status_code=error.status, headers=headers)


async def _on_expected(_: Request, error: Exception) -> JSONResponse:
    match error:
        case ApiError():
            return respond(error)
        case HTTPException():
            return respond(from_http(error))
        case BusError():
            mapped = from_bus(error)
            log.warning("bus error", error=repr(error), status=mapped.status)
            return respond(mapped)
        case _:  # ClientDisconnect
            message = "the client hung up within the body"
            return respond(ApiError(CLIENT_CLOSED_REQUEST, message, code="client_closed_request"))


async def _on_crash(_: Request, _error: Exception) -> JSONResponse:
    # Starlette raises it again after this answer, and uvicorn logs it with its traceback.
    return respond(ApiError(500, "internal error: the log has the details", code="internal_error"))


HANDLERS: dict[type[Exception], ExceptionHandler] = {
    ApiError: _on_expected,
    HTTPException: _on_expected,
    BusError: _on_expected,
    ClientDisconnect: _on_expected,
    Exception: _on_crash,
}
