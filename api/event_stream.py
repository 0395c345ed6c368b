"""Answers that are server-sent events, as the HTML standard defines them (section 9.2)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import NamedTuple

import msgspec
from starlette.responses import StreamingResponse

from triptych.api.services import ApiRequest

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
    request: ApiRequest,
    events: AsyncIterator[ServerEvent],
    headers: Mapping[str, str] | None = None,
    *,
    at_stop: ServerEvent | None = None,
    on_disconnect: Callable[[], None] | None = None,
) -> StreamingResponse:
    """Make the answer that sends events as they come; it ends with them, or once the server stops.

    Args:
        request: Of the client; HEAD gets the headers alone.
        events: What is sent.
        headers: Beside those of every stream.
        at_stop: Sent last where the server stops before `events` end.
        on_disconnect: Called where the client hangs up before `events` end.
    """
    body: AsyncIterator[bytes] | tuple[bytes, ...] = ()
    if request.method != "HEAD":
        body = _body(events, request.state["services"].stopping, at_stop, on_disconnect)
    return StreamingResponse(body, media_type=MEDIA_TYPE, headers={**_HEADERS, **(headers or {})})


async def _body(
    events: AsyncIterator[ServerEvent],
    stopping: asyncio.Event,
    at_stop: ServerEvent | None,
    on_disconnect: Callable[[], None] | None,
) -> AsyncIterator[bytes]:
    stopped = asyncio.ensure_future(stopping.wait())
    following: asyncio.Future[ServerEvent | None] | None = None
    try:
        while True:
            following = asyncio.ensure_future(anext(events, None))
            await asyncio.wait({following, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                if at_stop is not None:
                    yield encode(at_stop)
                return
            if (event := following.result()) is None:
                return
            yield encode(event)
    except (asyncio.CancelledError, GeneratorExit):  # nobody reads any more
        if on_disconnect is not None and not stopping.is_set():
            on_disconnect()
        raise
    finally:
        stopped.cancel()
        if following is not None:
            following.cancel()
