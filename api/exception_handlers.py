"""What an endpoint may raise, and the answer to each: the table that the application is given."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from triptych.api.errors import (
    CLIENT_CLOSED_REQUEST,
    HEAD_UNREACHABLE,
    ApiError,
    error_response,
    from_bus,
    from_http,
    store_unavailable,
)
from triptych.api.responses import JSONResponse
from triptych.api.services import ApiRequest
from triptych.bus import BusError
from triptych.roles.media.files import StoreUnavailableError

log = structlog.stdlib.get_logger("api")

OPERATOR_RETRY_S: Final = 60.0
"""After which a client may retry where an operator has to act."""


async def on_api_error(request: ApiRequest, error: ApiError) -> JSONResponse:
    """Answer with the error."""
    if error.status == HTTPStatus.UNPROCESSABLE_ENTITY:  # maybe for a description that is out of date
        request.state["services"].head.forget_descriptions()
    return error_response(error)


async def on_http_exception(request: ApiRequest, error: HTTPException) -> JSONResponse:
    """Answer Starlette's own errors: no such route, method not allowed."""
    return error_response(from_http(error, request.method, request.url.path))


async def on_bus_error(request: ApiRequest, error: BusError) -> JSONResponse:
    """Answer what the head or the bus refuses; where the head was given up, say that a retry does not help."""
    mapped = from_bus(error)
    cluster = request.state["services"].cluster
    if mapped.code == HEAD_UNREACHABLE and (reason := await cluster.give_up_reason("head")):
        message = f"the head is not started any more ({reason}): the server has to be restarted"
        mapped = ApiError(503, message, code=HEAD_UNREACHABLE, retry_after_s=OPERATOR_RETRY_S)
    if mapped.status != HTTPStatus.NOT_FOUND:
        log.warning("bus error", error=repr(error), status=mapped.status)
    return error_response(mapped)


async def on_store_unavailable(_: ApiRequest, error: StoreUnavailableError) -> JSONResponse:
    """Answer that the place of `[store] url` cannot be reached now."""
    log.warning("the store cannot be reached", error=str(error))
    return error_response(store_unavailable())


async def on_client_disconnect(_: ApiRequest, _error: ClientDisconnect) -> JSONResponse:
    """Note in the access log that the client hung up within the body; nobody reads the answer."""
    message = "the client hung up within the body"
    return error_response(ApiError(CLIENT_CLOSED_REQUEST, message, code="client_closed_request"))


async def on_crash(_: ApiRequest, _error: Exception) -> JSONResponse:
    """Answer 500; Starlette raises the error again after this answer, and uvicorn logs it with its traceback."""
    return error_response(ApiError(500, "internal error: the log has the details", code="internal_error"))


EXCEPTION_HANDLERS: Final[Mapping[type[Exception], Any]] = {
    ApiError: on_api_error,
    HTTPException: on_http_exception,
    BusError: on_bus_error,
    StoreUnavailableError: on_store_unavailable,
    ClientDisconnect: on_client_disconnect,
    Exception: on_crash,
}
