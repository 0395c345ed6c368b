"""Limit connections: their number, and the length of a request's headers and the time in which they must arrive."""

from __future__ import annotations

import asyncio
import resource
from http import HTTPStatus
from typing import Any, Final

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from triptych.api.errors import ApiError, error_response

log = structlog.stdlib.get_logger("api")

HEADER_TIMEOUT_S: Final = 10.0
"""From the opening of a connection, or the end of the previous answer, to the end of a request's headers."""
MAX_HEADER_BYTES: Final = 1 << 16
"""Of the target and all headers of a request; llhttp, which parses them, has no limit of its own."""
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


class LimitedProtocol(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits of connections and of headers."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._header_timeout_s = limits.header_timeout_s
        self._header_timer: asyncio.TimerHandle | None = None
        self._in_headers = False
        self._header_bytes = 0
        self._kept_bytes = 0  # by the parser, of a header that is not whole yet; at most a read more

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
        self._kept_bytes += len(data)
        super().data_received(data)
        if self._kept_bytes > MAX_HEADER_BYTES:
            self._refuse(_TOO_LONG)
        self._watch_headers()

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self._in_headers, self._header_bytes, self._kept_bytes = True, 0, 0

    def on_url(self, url: bytes) -> None:
        """Take the target, or a part of it."""
        self._count(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, of the head or behind a body in chunks."""
        self._count(name, value)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Serve the request."""
        super().on_headers_complete()
        self._in_headers, self._kept_bytes = False, 0

    def on_body(self, body: bytes) -> None:
        """Take a part of the body."""
        self._kept_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Note that the body is whole."""
        self._kept_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or has too long headers, and close."""
        self._refuse(_TOO_LONG if self._header_bytes > MAX_HEADER_BYTES else _MALFORMED)

    def _count(self, *parts: bytes) -> None:
        self._kept_bytes = 0
        self._header_bytes += sum(map(len, parts))
        if self._header_bytes > MAX_HEADER_BYTES:
            raise ValueError("the headers are too long")  # which ends the parser, and becomes send_400_response

    def _refuse(self, answer: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(answer)
            self.transport.close()

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
        if self._in_headers:
            self._refuse(_TIMEOUT)
        self.transport.close()  # a client that has sent nothing is not answered


def _closing_answer(error: ApiError) -> bytes:
    answer = error_response(error)
    body = bytes(answer.body)
    lines = [f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in answer.headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


_TIMEOUT: Final = _closing_answer(
    ApiError(408, "the headers of the request did not arrive in time: retry", code="timeout")
)
_MALFORMED: Final = _closing_answer(ApiError(400, "this is no HTTP request", code="malformed"))
_TOO_LONG: Final = _closing_answer(
    ApiError(431, f"the headers of a request must be at most {MAX_HEADER_BYTES} bytes", code="too_long")
)
