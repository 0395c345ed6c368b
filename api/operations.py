"""What the OpenAPI document says of an endpoint: declared where the endpoint is, read by `openapi.py`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar

import msgspec
from starlette.endpoints import HTTPEndpoint
from starlette.responses import Response

Endpoint: TypeAlias = Callable[[Any], Awaitable[Response]]
E = TypeVar("E", bound=Endpoint)

FILE: Final = "file"
EVENTS: Final = "events"
TEXT: Final = "text"
OneAnswer: TypeAlias = type[msgspec.Struct] | str | None
"""The struct of a JSON answer, or the name of its schema in `openapi.py`; FILE for media, EVENTS for server-sent
events, TEXT, None for no body."""
Answer: TypeAlias = OneAnswer | tuple[OneAnswer, ...]
"""Several where the client chooses, such as JSON or events."""

FILE_ANSWERS: Final[Mapping[int, Answer]] = {200: FILE, 206: FILE, 304: None}
FILE_ERRORS: Final = (404, 410, 412, 416)
FILE_HEADERS: Final = ("If-None-Match", "If-Modified-Since", "If-Match", "If-Unmodified-Since", "Range", "If-Range")
_ACCESS_ERRORS: Final = (403, 421)
_BODY_ERRORS: Final = (400, 404, 408, 413, 415, 422, 429, 503)
_HEAD_ERRORS: Final = (429, 500)
"""Of whatever asks the head, beside 503: its mailbox is full, or it fails."""


class RequestBody(NamedTuple):
    """The body of a request for media, JSON or a form."""

    fields: type[msgspec.Struct]
    images: Mapping[str, str]
    """Fields that are images, and what they are for."""
    required: tuple[str, ...] = ()
    """Names of those that must be given, beside what `fields` requires."""
    closed: bool = False
    """Whether there are no other fields; else any other one is a parameter of the model."""


@dataclass(frozen=True)
class Operation:
    """One method of one path."""

    id: str
    summary: str
    answers: Mapping[int, Answer]
    """By status, those that are no errors of OpenAI's shape."""
    errors: tuple[int, ...]
    headers: tuple[str, ...]
    """Of the request: names in `openapi.HEADERS`."""
    answer_headers: tuple[str, ...]
    """Of answers that are no errors, beside those that follow from the status: names in `openapi.ANSWER_HEADERS`."""
    query: type[msgspec.Struct] | None
    body: RequestBody | None


OPERATIONS: Final[dict[Endpoint, Operation]] = {}


def operation(
    answers: Mapping[int, Answer],
    errors: tuple[int, ...] = (),
    *,
    headers: tuple[str, ...] = (),
    answer_headers: tuple[str, ...] = (),
    query: type[msgspec.Struct] | None = None,
    body: RequestBody | None = None,
) -> Callable[[E], E]:
    """Declare an endpoint: its name becomes the operationId, the first line of its docstring the summary."""

    def declare(endpoint: E) -> E:
        first, *rest = endpoint.__name__.split("_")
        summary = (endpoint.__doc__ or "").partition("\n")[0].removesuffix(".")
        all_errors = {*_ACCESS_ERRORS, *errors, *(_BODY_ERRORS if body else ())}
        if 503 in all_errors:
            all_errors |= {*_HEAD_ERRORS}
        id_ = first + "".join(map(str.capitalize, rest))
        errors_in_order = tuple(sorted(all_errors - answers.keys()))
        OPERATIONS[endpoint] = Operation(id_, summary, answers, errors_in_order, headers, answer_headers, query, body)
        return endpoint

    return declare


def by_method(**endpoints: Endpoint) -> type[HTTPEndpoint]:
    """Make one endpoint of several, such as `by_method(get=list_videos, post=create_video)`."""
    return type("ByMethod", (HTTPEndpoint,), {method: staticmethod(endpoint) for method, endpoint in endpoints.items()})
