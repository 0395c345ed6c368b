"""Connections are bounded, in number and in the time that the head of a request may take."""

from __future__ import annotations

import asyncio
import resource
from typing import Any, Final

import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol

from triptych.api.errors import ApiError, respond

log = structlog.stdlib.get_logger("api")

HEAD_S: Final = 10.0
"""From the opening of a connection, or the end of the answer before, to the end of a request's head."""
SURPLUS_S: Final = 1.0
"""The same for a connection that is one too many."""
SURPLUS: Final = 64
"""How many of those are heard, to be told so; any more are closed at once."""
RESERVED: Final = 128 + SURPLUS
"""Of the descriptors that a process may have: for the bus, for files that are read, for those."""
LOG_EVERY_S: Final = 1.0


def raise_file_limit() -> int:
    """Let this process open as many files as it may; returns how many those are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


def most_connections(wanted: int, files: int) -> int:
    """Return how many connections there may be: no more than wanted, and than leave `RESERVED` of `files`."""
    return max(1, min(wanted, files - RESERVED))


class Bounds:
    """How many connections there may be, and how many were one too many."""

    def __init__(self, most: int, head_s: float = HEAD_S) -> None:
        self.most = most
        self.head_s = head_s
        self.refused = 0
        self._logged_at = float("-inf")
        self._logged = 0

    def refuse(self, open_now: int, now: float) -> None:
        """Count a connection that is too many, and say so at most once in `LOG_EVERY_S` (`now` is of any clock)."""
        self.refused += 1
        if now - self._logged_at >= LOG_EVERY_S:
            new = self.refused - self._logged
            log.warning("connections refused", limit=self.most, open=open_now, refused=new)
            self._logged_at, self._logged = now, self.refused


class Connection(H11Protocol):
    """uvicorn's, with bounds."""

    def __init__(self, *args: Any, bounds: Bounds, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bounds = bounds
        self._head_s = bounds.head_s
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; one connection too many gets an answer that says so, if it asks soon."""
        super().connection_made(transport)
        surplus = len(self.connections) - self._bounds.most
        if surplus > 0:
            self._bounds.refuse(len(self.connections), self.loop.time())
            if surplus > SURPLUS:
                transport.abort()
                return
            error = ApiError(503, "the server has all the connections that it may have: try again", code="full")
            error.headers["Connection"] = "close"
            self.app = respond(error)
            self._head_s = min(SURPLUS_S, self._head_s)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        self._stop_watching()

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch_head()

    def _watch_head(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if self.transport.is_closing() or not is_idle:
            self._stop_watching()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_s, self._head_is_late)

    def _stop_watching(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:  # who has said nothing at all is not answered
            self.transport.write(_TOO_SLOW)
        self.transport.close()


def _too_slow() -> bytes:
    answer = respond(ApiError(408, "the head of the request did not arrive in time", code="timeout"))
    body = bytes(answer.body)
    head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


_TOO_SLOW: Final = _too_slow()
