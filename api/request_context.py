"""What every request and response carries: a request id and a W3C trace context."""

from __future__ import annotations

import os
import re
import secrets
import time
from typing import Final

import structlog
from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triptych.actors.runtime.metrics import REGISTRY
from triptych.api.errors import CLIENT_CLOSED_REQUEST
from triptych.api.services import RequestState, Services

log = structlog.stdlib.get_logger("api")
ANSWERS: Final = Counter(
    "triptych_http_responses", "Answers of the API below /v1/, by HTTP status.", ["method", "status"], registry=REGISTRY
)
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# https://www.w3.org/TR/trace-context/, version 00.
_TRACEPARENT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


def new_request_id() -> str:
    """Make an id that is unique and sorts by time: 48 bits of unix milliseconds, then 80 random bits."""
    return f"req_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


def child_traceparent(traceparent: str) -> str:
    """Return a new span of the trace of a W3C `traceparent` header; one that cannot be read starts a new trace."""
    match = _TRACEPARENT.fullmatch(traceparent)
    if match is None or not int(match[1], 16) or not int(match[2], 16):
        return f"00-{os.urandom(16).hex()}-{os.urandom(8).hex()}-01"
    return f"00-{match[1]}-{os.urandom(8).hex()}-{match[3]}"


class RequestContextMiddleware:
    """ASGI middleware around the whole application, so that the answer to a crash has its headers as well."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self.app = app
        self.services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request and log it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        request_id = new_request_id()
        traceparent = child_traceparent(Headers(scope=scope).get("traceparent", ""))
        state: RequestState = {"services": self.services, "request_id": request_id, "owner": "", "max_priority": 0}
        scope["state"] = state

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Request-Id", request_id)
                headers["traceparent"] = traceparent
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            status = status or CLIENT_CLOSED_REQUEST
            if scope["path"].startswith("/v1/"):
                method = scope["method"] if scope["method"] in _METHODS else "other"  # a client may call it anything
                ANSWERS.labels(method, str(status)).inc()
                log.info(
                    "http",
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    seconds=round(time.monotonic() - started, 4),
                    **({"owner": owner} if (owner := state["owner"]) else {}),
                    request_id=request_id,
                    traceparent=traceparent,
                )
