"""Every error in OpenAI's shape, mapped in one place: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from http import HTTPStatus

from starlette.exceptions import HTTPException

from triptych.api.responses import JSONResponse
from triptych.bus import AskTimeoutError, BusError, MailboxFullError, MessageTooLongError, RemoteError, UnreachableError

CLIENT_CLOSED_REQUEST = 499
"""nginx's number for it. Only the access log shows it."""

HEAD_UNREACHABLE = "head_unreachable"
DEFAULT_RETRY_AFTER_S = 1.0
"""After which a client may retry, where nothing better is known."""
STORE_RETRY_S = 5.0
_RETRYABLE = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
_MAX_MESSAGE = 2000
_MAX_PARAM = 200


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


def field_error(
    param: str, predicate: str, *, subject: str = "", status: int = 422, code: str = "invalid_value", retry_s: float = 0
) -> ApiError:
    """Make an error about a field.

    Args:
        param: The field as the client sent it.
        predicate: What is wrong, a sentence without its subject: "must be 64".
        subject: Of the sentence; "" for the field.
        status: Of HTTP.
        code: For programs.
        retry_s: After how many seconds the client may retry; 0 where a retry does not help.
    """
    return ApiError(status, f"{subject or param} {predicate}", code=code, param=param, retry_after_s=retry_s)


def not_found(message: str, code: str = "not_found", param: str | None = None) -> ApiError:
    """Make a 404."""
    return ApiError(404, message, code=code, param=param)


def from_bus(error: BusError) -> ApiError:
    """Map an error of the bus to an HTTP error."""
    match error:
        case MailboxFullError():
            return ApiError(429, "the server is busy; retry later", code="full")
        case MessageTooLongError():
            return ApiError(413, "the request is too long: shorten its texts and lists", code="too_long")
        case AskTimeoutError() | UnreachableError():
            message = "the head does not answer, it may be restarting: retry later"
            return ApiError(503, message, code=HEAD_UNREACHABLE)
        case RemoteError(code="not_found"):
            return not_found(error.detail)
        case RemoteError(code="model_not_found"):
            return not_found(error.detail, code=error.code, param="model")
        case RemoteError(code="unavailable"):
            return ApiError(503, error.detail, code="unavailable")
        case RemoteError(code="stopping" | "deadline_exceeded" | "stale_generation"):
            message = f"the head did not take the request ({error.code}): retry later"
            return ApiError(503, message, code="unavailable")
        case _:
            return ApiError(500, "the head failed on this request", code="internal_error")


def store_unavailable() -> ApiError:
    """Make a 503: the place of `[store] url` cannot be reached now."""
    message = "the server's file store does not answer: retry later"
    return ApiError(503, message, code="store_unavailable", retry_after_s=STORE_RETRY_S)


def from_http(error: HTTPException, method: str, path: str) -> ApiError:
    """Map Starlette's own errors: no such route, method not allowed."""
    phrase = HTTPStatus(error.status_code).phrase
    headers = dict(error.headers or {})
    message = error.detail
    if error.status_code == HTTPStatus.NOT_FOUND:
        message = f"there is nothing at {path}: GET /openapi.json lists what there is"
    elif error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        message = f"{path} does not take {method}, but {headers.get('Allow', 'other methods')}"
    mapped = ApiError(error.status_code, message, code=phrase.lower().replace(" ", "_"))
    mapped.headers.update(headers)
    return mapped


def error_type(status: int) -> str:
    """Return OpenAI's word for the class of error."""
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"


def error_response(error: ApiError) -> JSONResponse:
    """Make the response; its headers tell a client whether to retry, and when, as OpenAI's clients do."""
    headers = dict(error.headers)
    if error.status not in _RETRYABLE:
        headers["X-Should-Retry"] = "false"
    elif error.status != HTTPStatus.REQUEST_TIMEOUT:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s or DEFAULT_RETRY_AFTER_S))
    return JSONResponse({"error": error_object(error)}, status_code=error.status, headers=headers)


def error_object(error: ApiError) -> dict[str, str | None]:
    """Return OpenAI's error object."""
    return {
        "message": _truncate(error.message, _MAX_MESSAGE),
        "type": error_type(error.status),
        "param": None if error.param is None else _truncate(error.param, _MAX_PARAM),
        "code": error.code,
    }


def _truncate(text: str, most: int) -> str:
    # Errors quote what a client sent, which may be long.
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"
