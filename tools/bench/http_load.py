"""A client of HTTP that costs little: kept-alive connections, and one request at a time on each."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple, cast

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_CHUNKED: Final = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_LAST_CHUNK: Final = b"\r\n0\r\n\r\n"


class Answer(NamedTuple):
    """One answer."""

    status: int
    body: bytes
    """As it was sent: with its chunks, where it has some."""


class Connection(asyncio.Protocol):
    """One connection; `ask` is not called again before it has returned."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._answer: asyncio.Future[Answer] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the request that waits."""
        self._transport = None
        if self._answer and not self._answer.done():
            self._answer.set_exception(exc or ConnectionResetError("the server has closed the connection"))

    def data_received(self, data: bytes) -> None:
        """Collect the answer."""
        self._received += data
        found = parse(self._received)
        if found and self._answer and not self._answer.done():
            self._received.clear()
            self._answer.set_result(found)

    async def ask(self, request: bytes) -> Answer:
        """Send a whole request; raises ConnectionError where the connection is lost."""
        if self._transport is None:
            raise ConnectionResetError("the connection is closed")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        """Close the connection."""
        if self._transport:
            self._transport.close()


def parse(received: bytes | bytearray) -> Answer | None:
    """Read an answer, None until it is complete; pure."""
    end = received.find(b"\r\n\r\n")
    if end < 0:
        return None
    head, body = bytes(received[:end]), bytes(received[end + 4 :])
    status = int(head[9:12])
    if length := _LENGTH.search(head):
        return Answer(status, body) if len(body) >= int(length[1]) else None
    if _CHUNKED.search(head):
        return Answer(status, body) if (b"\r\n" + body).endswith(_LAST_CHUNK) else None
    return Answer(status, body)


def request_bytes(method: str, host: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> bytes:
    """Write a request; pure."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


async def connect(port: int, count: int) -> list[Connection]:
    """Open so many connections to a port of this machine."""
    loop = asyncio.get_running_loop()
    return [(await loop.create_connection(Connection, "127.0.0.1", port))[1] for _ in range(count)]


async def rate(connections: Sequence[Connection], request: bytes, expected: int, seconds: float) -> float:
    """Send a request again and again over each connection; return the answers per second.

    Raises:
        RuntimeError: There was an answer with another status than `expected`.
    """
    start = time.perf_counter()
    until = start + seconds
    statuses = Counter[int]()

    async def client(connection: Connection) -> None:
        while time.perf_counter() < until:
            answer = await connection.ask(request)
            statuses[answer.status] += 1
            if answer.status != expected:
                raise RuntimeError(f"{answer.status} in place of {expected}: {answer.body[:500]!r}")

    await asyncio.gather(*(client(connection) for connection in connections))
    return statuses[expected] / (time.perf_counter() - start)
