"""A receiver of webhooks on loopback: Starlette on uvicorn.

As a program it prints its port, then what comes, a JSON object a line.

python -m tests.api.webhook_receiver PORT STATUS
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route


class Received(NamedTuple):
    """A webhook as it came."""

    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> dict[str, Any]:
        return json.loads(self.body)


class Receiver:
    """Answers with `status`, or as `answer` says, and keeps what came."""

    def __init__(self, status: int = 204) -> None:
        self.status = status
        self.headers: dict[str, str] = {}
        self.received: list[Received] = []
        self.on_received: Callable[[Received], None] = lambda _: None
        self.answering = asyncio.Event()
        self.answering.set()
        self.port = 0
        self._news = asyncio.Condition()

    async def _hook(self, request: Request) -> Response:
        received = Received(dict(request.headers), await request.body())
        self.received.append(received)
        self.on_received(received)
        async with self._news:
            self._news.notify_all()
        await self.answering.wait()
        return Response(status_code=self.status, headers=self.headers)

    async def until(self, count: int) -> list[Received]:
        """Wait until so many have come."""
        async with asyncio.timeout(20), self._news:
            await self._news.wait_for(lambda: len(self.received) >= count)
        return self.received

    @contextlib.asynccontextmanager
    async def serving(self, port: int = 0, certificate: Path | None = None) -> AsyncIterator[str]:
        """Listen, with TLS where there is a certificate; yields the URL."""
        listener = socket.create_server(("127.0.0.1", port))
        self.port = listener.getsockname()[1]
        app = Starlette(routes=[Route("/hook", self._hook, methods=["POST"])])
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ssl_certfile=certificate))
        server.capture_signals = contextlib.nullcontext
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"{'https' if certificate else 'http'}://127.0.0.1:{self.port}/hook"
        finally:
            self.answering.set()
            server.should_exit = server.force_exit = True
            await task
            listener.close()


async def main(port: int, status: int) -> None:
    receiver = Receiver(status)
    receiver.on_received = lambda received: print(
        json.dumps({"headers": received.headers, "body": received.body.decode()}), flush=True
    )
    async with receiver.serving(port):
        print(receiver.port, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
