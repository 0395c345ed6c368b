"""What every request and response carries: a request id and a W3C trace context."""

from __future__ import annotations

import secrets
import time
from typing import Final

import structlog
from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from triptych.actors.runtime.logs import printable
from triptych.actors.runtime.metrics import REGISTRY
from triptych.api.errors import CLIENT_CLOSED_REQUEST
from triptych.api.services import RequestState, Services
from triptych.roles.tracing import (
    REQUEST_ID_PREFIX,
    TraceContext,
    TraceSpan,
    is_sampled,
    new_span_id,
    read_traceparent,
    traced_request_id,
)

log = structlog.stdlib.get_logger("api")
ANSWERS: Final = Counter(
    "triptych_http_responses", "Answers of the API below /v1/, by HTTP status.", ["method", "status"], registry=REGISTRY
)
_METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def new_request_id() -> str:
    """Make an id that is unique and sorts by time: 48 bits of unix milliseconds, then 80 random bits."""
    return f"{REQUEST_ID_PREFIX}{time.time_ns() // 1_000_000:012x}{secrets.token_hex(10)}"


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
        exporter, share = self.services.exporter, self.services.topology.otel.sample
        client = read_traceparent(Headers(scope=scope).get("traceparent", ""))
        trace = child_of(client, request_id, share if exporter and begins_trace(scope) else 0.0)
        if exporter and trace.sampled:
            request_id = traced_request_id(trace)
        state: RequestState = {"services": self.services, "request_id": request_id, "owner": "", "max_priority": 0}
        scope["state"] = state

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault("X-Request-Id", request_id)
                headers["traceparent"] = trace.traceparent
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        finally:
            seconds, status = time.monotonic() - started, status or CLIENT_CLOSED_REQUEST
            if scope["path"].startswith("/v1/"):
                method = scope["method"] if scope["method"] in _METHODS else "other"  # a client may call it anything
                ANSWERS.labels(method, str(status)).inc()
                log.info(
                    "http",
                    method=scope["method"],
                    path=printable(scope["path"]),
                    status=status,
                    seconds=round(seconds, 4),
                    **({"owner": owner} if (owner := state["owner"]) else {}),
                    request_id=request_id,
                    traceparent=trace.traceparent,
                )
            if exporter and trace.sampled:
                exporter.export([http_span(trace, client.span_id if client else "", scope, status, seconds)])


def begins_trace(scope: Scope) -> bool:
    """Return whether an HTTP request without a trace may begin one: those that look at something do not."""
    path: str = scope["path"]
    return scope["method"] == "POST" and path.startswith("/v1/")


def child_of(client: TraceContext | None, request_id: str, share: float) -> TraceContext:
    """Return the context of the span of an HTTP request.

    Args:
        client: That of the client; None to begin a trace, with the digits of the request's id.
        request_id: As `new_request_id` makes it.
        share: Of the traces that are begun, which are exported.
    """
    if client is not None:
        return client._replace(span_id=new_span_id())
    trace_id = request_id.removeprefix(REQUEST_ID_PREFIX)
    return TraceContext(trace_id, new_span_id(), is_sampled(trace_id, share))


def http_span(trace: TraceContext, parent_id: str, scope: Scope, status: int, seconds: float) -> TraceSpan:
    """Return the span of an HTTP request that has been answered just now."""
    route = scope["path"] if "endpoint" in scope else ""
    for name, value in scope.get("path_params", {}).items():
        route = route.replace(str(value), f"{{{name}}}")  # or each request would have a name of its own
    ended = time.time()
    return TraceSpan(
        trace,
        f"{scope['method']} {route}".rstrip(),
        ended - seconds,
        ended,
        parent_id,
        {"http.request.method": scope["method"], "url.path": scope["path"], "http.response.status_code": status},
        f"status {status}" if status >= 500 else "",
        server=True,
    )
