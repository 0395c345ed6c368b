"""What every response carries: a request id and a W3C trace context."""

from __future__ import annotations

import secrets
import time

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triptych.bus import child_traceparent, current_traceparent

log = structlog.stdlib.get_logger("api")


def new_request_id() -> str:
    """Make an id that is unique and sorts by time: 48 bits of unix milliseconds, then 80 random bits."""
    return f"req_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


class RequestContextMiddleware:
    """ASGI middleware round the whole application, so that the answer to a crash has its headers as well."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request and log it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        request_id = new_request_id()
        traceparent = child_traceparent(Headers(scope=scope).get("traceparent", ""))
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Request-Id", request_id)
                headers["traceparent"] = traceparent
            await send(message)

        token = current_traceparent.set(traceparent)
        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            current_traceparent.reset(token)
            if scope["path"].startswith("/v1/"):
                log.info(
                    "http",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    seconds=round(time.monotonic() - started, 4),
                    **({"owner": owner} if (owner := scope["state"].get("owner")) else {}),
                    request_id=request_id,
                    traceparent=traceparent,
                )
