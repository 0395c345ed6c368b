"""GET /v1/requests, and what lists of requests and of videos share: pages after an id, by age."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from triptych.api.errors import not_found
from triptych.api.media_request import validation_error
from triptych.api.operations import operation
from triptych.api.requests import request_object
from triptych.api.responses import JSONResponse
from triptych.api.services import ApiRequest
from triptych.bus import RemoteError
from triptych.roles.messages.requests import ListRequests, RequestList, RequestView

Q = TypeVar("Q", bound=msgspec.Struct)


class ListQuery(msgspec.Struct, frozen=True):
    """Which part of the list."""

    after: Annotated[str, Meta(description="The id that the list goes on after.")] = ""
    limit: Annotated[int, Meta(ge=1, le=100, description="Most of them.")] = 20
    order: Annotated[Literal["asc", "desc"], Meta(description="By age.")] = "desc"


class RequestsQuery(ListQuery, frozen=True):
    """Which requests."""

    status: Annotated[Literal["all", "active", "ended"], Meta(description="Whether they have ended.")] = "all"


@operation({200: "RequestList"}, (404, 422, 503), query=RequestsQuery)
async def list_requests(request: ApiRequest) -> JSONResponse:
    """List requests page by page, the newest first unless asked otherwise."""
    query = read_query(request, RequestsQuery)
    found = await list_page(request, query, active={"active": True, "ended": False}.get(query.status))
    data = [request_object(request, view) for view in await views_of(request, found.request_ids)]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return JSONResponse(
        {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": found.has_more and bool(data)}
    )


def read_query(request: ApiRequest, kind: type[Q]) -> Q:
    """Read the parameters of a query; raises ApiError 422."""
    try:
        return msgspec.convert(dict(request.query_params), kind, strict=False)
    except msgspec.ValidationError as error:
        raise validation_error(error, kind) from None


async def list_page(
    request: ApiRequest,
    query: ListQuery,
    *,
    of: str = "request",
    active: bool | None = None,
    output_format: str = "",
) -> RequestList:
    """Return the ids of a page; raises ApiError 404 where `after` is none of the client's.

    Args:
        request: Of the client.
        query: Which page.
        of: What is listed, for the error.
        active: Only those that have not ended, or only those that have.
        output_format: Only those whose files have it.
    """
    newest_first = query.order == "desc"
    message = ListRequests(request.state["owner"], query.after, query.limit, newest_first, active, output_format)
    try:
        return await request.state["services"].head.list_requests(message)
    except RemoteError as error:
        if error.code != "not_found":
            raise
        raise not_found(f"there is no {of} {query.after}", param="after") from None


async def views_of(request: ApiRequest, ids: Sequence[str]) -> list[RequestView]:
    """Return the requests of these ids, without those that have been removed meanwhile."""
    head, owner = request.state["services"].head, request.state["owner"]
    return await gather_found(head.query(id_, owner) for id_ in ids)


async def gather_found(asks: Iterable[Awaitable[RequestView]]) -> list[RequestView]:
    """Return the views that the head is asked for, without those of requests that have been removed meanwhile.

    Raises what one of the asks has raised once all of them have ended.
    """
    views = []
    for view in await asyncio.gather(*asks, return_exceptions=True):
        if isinstance(view, RequestView):
            views.append(view)
        elif not (isinstance(view, RemoteError) and view.code == "not_found"):
            raise view
    return views
