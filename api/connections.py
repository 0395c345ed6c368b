"""Limit connections: their number, and the time in which the headers of a request must arrive."""

from __future__ import annotations

import asyncio
import resource
from typing import Any, Final

import structlog
from uvicorn.protocols.http.h11_impl import H11Protocol

from triptych.api.errors import ApiError, error_response

log = structlog.stdlib.get_logger("api")

HEADER_TIMEOUT_S: Final = 10.0
"""From the opening of a connection, or the end of the previous answer, to the end of a request's headers."""
REFUSAL_TIMEOUT_S: Final = 1.0
"""The same for a connection beyond the limit."""
MAX_REFUSALS: Final = 64
"""How many of those get an answer; any more are closed at once."""
RESERVED_DESCRIPTORS: Final = 128 + MAX_REFUSALS
"""File descriptors kept free for the bus, for files that are read, and for refusals."""
LOG_EVERY_S: Final = 1.0


def raise_file_limit() -> int:
    """Let this process open as many files as it may; returns how many those are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard if hard != resource.RLIM_INFINITY else 1 << 20


def connection_limit(wanted: int, files: int) -> int:
    """Return how many connections may be open: at most `wanted`, and `RESERVED_DESCRIPTORS` of `files` stay free."""
    return max(1, min(wanted, files - RESERVED_DESCRIPTORS))


class ConnectionLimits:
    """The limit of connections, and how many were refused."""

    def __init__(self, limit: int, header_timeout_s: float = HEADER_TIMEOUT_S) -> None:
        self.limit = limit
        self.header_timeout_s = header_timeout_s
        self.refused = 0
        self._logged_at = float("-inf")
        self._logged = 0

    def refuse(self, open_now: int, now: float) -> None:
        """Count a refused connection, and log at most once in `LOG_EVERY_S` (`now` is of any clock)."""
        self.refused += 1
        if now - self._logged_at >= LOG_EVERY_S:
            new = self.refused - self._logged
            log.warning("connections refused", limit=self.limit, open=open_now, refused=new)
            self._logged_at, self._logged = now, self.refused


class LimitedH11Protocol(H11Protocol):
    """uvicorn's HTTP protocol with a connection limit and a header timeout."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._header_timeout_s = limits.header_timeout_s
        self._header_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; a connection beyond the limit gets an answer that says so, if it sends a request soon."""
        super().connection_made(transport)
        excess = len(self.connections) - self._limits.limit
        if excess > 0:
            self._limits.refuse(len(self.connections), self.loop.time())
            if excess > MAX_REFUSALS:
                transport.abort()
                return
            error = ApiError(503, "the server has too many connections: retry later", code="full")
            error.headers["Connection"] = "close"
            self.app = error_response(error)
            self._header_timeout_s = min(REFUSAL_TIMEOUT_S, self._header_timeout_s)
        self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        super().connection_lost(exc)
        self._stop_watching()

    def data_received(self, data: bytes) -> None:
        """Handle bytes of the client."""
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch_headers()

    def _watch_headers(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if self.transport.is_closing() or not is_idle:
            self._stop_watching()
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(self._header_timeout_s, self._header_timeout)

    def _stop_watching(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _header_timeout(self) -> None:
        self._header_timer = None
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:  # a client that has sent nothing is not answered
            self.transport.write(_TIMEOUT_RESPONSE)
        self.transport.close()


def _timeout_response() -> bytes:
    answer = error_response(ApiError(408, "the headers of the request did not arrive in time: retry", code="timeout"))
    body = bytes(answer.body)
    head = f"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


_TIMEOUT_RESPONSE: Final = _timeout_response()
