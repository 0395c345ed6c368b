"""Answers that are server-sent events, as the HTML standard defines them (section 9.2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import NamedTuple

import msgspec
from starlette.responses import StreamingResponse

MEDIA_TYPE = "text/event-stream"
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Proxies such as nginx must pass each event on at once."""


class ServerEvent(NamedTuple):
    """One event."""

    name: str
    """Of the event; "" for a comment, which says that the connection lives."""
    data: object = None
    """What JSON can have."""
    id: str = ""
    """What the client sends as Last-Event-ID to go on after this event; "" for the last one that it had."""


ALIVE = ServerEvent("")


def encode(event: ServerEvent) -> bytes:
    """Write an event as it is sent."""
    if not event.name:
        return b":\n\n"
    id_line = f"id: {event.id}\n" if event.id else ""
    return f"{id_line}event: {event.name}\ndata: ".encode() + msgspec.json.encode(event.data) + b"\n\n"


def event_stream(
    events: AsyncIterator[ServerEvent], stopping: asyncio.Event, headers: Mapping[str, str] | None = None
) -> StreamingResponse:
    """Make the answer that sends events as they come; it ends with them, or once the server is `stopping`."""
    body = _body(events, stopping)
    return StreamingResponse(body, media_type=MEDIA_TYPE, headers={**_HEADERS, **(headers or {})})


async def _body(events: AsyncIterator[ServerEvent], stopping: asyncio.Event) -> AsyncIterator[bytes]:
    stopped = asyncio.ensure_future(stopping.wait())
    following: asyncio.Future[ServerEvent | None] | None = None
    try:
        while True:
            following = asyncio.ensure_future(anext(events, None))
            await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done() or (event := following.result()) is None:
                return
            yield encode(event)
    finally:  # also when the client has hung up: what makes the events learns of it by its cancellation
        stopped.cancel()
        if following is not None:
            following.cancel()
