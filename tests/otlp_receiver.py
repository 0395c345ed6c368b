"""A receiver of traces: OTLP over HTTP, as OpenTelemetry's collector has it, with the SDK's own protobuf messages."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import uvicorn
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from triptych.api.server import Server


class Received(NamedTuple):
    """A span as it came."""

    service: str
    instance: str
    trace_id: str
    span_id: str
    parent_id: str
    name: str
    began: float
    ended: float
    attributes: dict[str, Any]
    error: str
    """"" where its status is no error."""
    server: bool


class OtlpReceiver:
    """Keeps the spans that come."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self._came = asyncio.Event()

    async def until(self, condition: Callable[[list[Received]], bool], bound_s: float) -> list[Received]:
        """The spans, once the condition holds for them."""
        async with asyncio.timeout(bound_s):
            while not condition(self.spans):
                self._came.clear()
                await self._came.wait()
        return self.spans

    async def take(self, request: Request) -> Response:
        body = ExportTraceServiceRequest.FromString(await request.body())
        for group in body.resource_spans:
            resource = values(group.resource.attributes)
            for scope in group.scope_spans:
                self.spans += [received(span, resource) for span in scope.spans]
        self._came.set()
        return Response(ExportTraceServiceResponse().SerializeToString(), media_type="application/x-protobuf")


def received(span: Span, resource: dict[str, Any]) -> Received:
    status = span.status
    return Received(
        resource["service.name"],
        resource["service.instance.id"],
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.name,
        span.start_time_unix_nano / 1e9,
        span.end_time_unix_nano / 1e9,
        values(span.attributes),
        status.message if status.code == Status.StatusCode.STATUS_CODE_ERROR else "",
        span.kind == Span.SpanKind.SPAN_KIND_SERVER,
    )


def values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@asynccontextmanager
async def otlp_receiver(port: int = 0) -> AsyncIterator[tuple[OtlpReceiver, str]]:
    """A receiver that runs, and its URL."""
    receiver = OtlpReceiver()
    app = Starlette(routes=[Route("/v1/traces", receiver.take, methods=["POST"])])
    server = Server(uvicorn.Config(app, lifespan="off", ws="none", log_config=None, access_log=False))
    with socket.create_server(("127.0.0.1", port)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield receiver, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving
