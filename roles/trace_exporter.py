"""Export the spans of a process over OTLP, as OpenTelemetry's collector and most tracing systems take them.

It needs `pip install "triptych[otel]"`. Nothing of OpenTelemetry is imported unless the topology, or the environment,
says where spans go.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import os
import threading
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final

import structlog

from triptych.actors import Actor, Component, StartError, Topology
from triptych.roles.tracing import TraceSpan

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

SUFFIX: Final = ".traces"
"""What the name of an exporter adds to that of its component."""
ENDPOINT_VARIABLES: Final = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
TRACES_PATH: Final = "/v1/traces"
EXPORT_EVERY_MS: Final = 1000
"""Unless OTEL_BSP_SCHEDULE_DELAY says otherwise: what a killed process loses."""
SEND_S: Final = 3.0
"""Seconds for one batch, repetitions included, unless OTEL_EXPORTER_OTLP_TIMEOUT says otherwise."""
LAST_SPANS_S: Final = 2.0
"""Seconds for the last spans of a process that stops."""
_INSTALL: Final = 'pip install "triptych[otel]"'


def exporter_of(component: Component, topology: Topology) -> TraceExporter | None:
    """Make the exporter of a process; None if nothing says where spans go.

    Raises:
        StartError: The topology says where, and OpenTelemetry is not installed.
    """
    endpoint = topology.otel.endpoint
    if not endpoint and not endpoint_of_environment(os.environ):
        return None
    try:
        return TraceExporter(component, endpoint)
    except ImportError as error:
        if endpoint:
            raise StartError(f"[otel] endpoint needs OpenTelemetry ({error}): {_INSTALL}") from error
        # The variable may be meant for others.
        structlog.stdlib.get_logger("actors").warning("no traces", reason=str(error), install=_INSTALL)
        return None


def endpoint_of_environment(environment: Mapping[str, str]) -> str:
    """Return where OpenTelemetry's variables say that spans go; "" if they do not, or turn it off."""
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return ""
    return next((found for name in ENDPOINT_VARIABLES if (found := environment.get(name, ""))), "")


class TraceExporter(Actor):
    """Exports spans, on a thread of OpenTelemetry's SDK. What does not arrive is dropped, and nothing waits for it.

    Args:
        component: Whose spans they are.
        endpoint: URL of an OTLP receiver, without `/v1/traces`; "" for that of OpenTelemetry's variables.

    Raises:
        ImportError: OpenTelemetry is not installed.
    """

    def __init__(self, component: Component, endpoint: str) -> None:
        super().__init__(f"{component.name}{SUFFIX}")
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.util.instrumentation import InstrumentationScope

        url = endpoint.rstrip("/") + TRACES_PATH if endpoint else None
        timeout = None if os.environ.get("OTEL_EXPORTER_OTLP_TIMEOUT") else SEND_S
        every = None if os.environ.get("OTEL_BSP_SCHEDULE_DELAY") else EXPORT_EVERY_MS
        sender = OTLPSpanExporter(endpoint=url, timeout=timeout)
        self._processor: BatchSpanProcessor = BatchSpanProcessor(sender, schedule_delay_millis=every)
        version = importlib.metadata.version("triptych")
        self._scope = InstrumentationScope("triptych", version)
        self._resource = Resource.create(
            {
                "service.name": os.environ.get("OTEL_SERVICE_NAME", "") or f"triptych-{component.kind}",
                "service.namespace": "triptych",
                "service.version": version,
                "service.instance.id": component.name,
                **({"host.name": component.host} if component.host else {}),
            }
        )
        self.exported = 0

    def export(self, spans: Iterable[TraceSpan]) -> None:
        """Have spans exported; call it from the event loop's thread."""
        for span in spans:
            self.exported += 1
            self._processor.on_end(self._readable(span))

    async def stopping(self) -> None:
        """Send what is left: the other actors of this process have stopped."""
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def send() -> None:
            self._processor.shutdown()  # type: ignore[no-untyped-call]
            with contextlib.suppress(RuntimeError):  # the loop was not kept waiting
                loop.call_soon_threadsafe(sent.set)

        # A thread that nobody joins: the receiver may not answer.
        threading.Thread(target=send, name="last spans", daemon=True).start()
        try:
            async with asyncio.timeout(LAST_SPANS_S):
                await sent.wait()
        except TimeoutError:
            self.log.warning("the last spans were not taken in time")

    def stats(self) -> dict[str, int | float | str | bool]:
        """Return how many spans were made."""
        return {"spans": self.exported}

    def _readable(self, span: TraceSpan) -> ReadableSpan:
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

        def context(span_id: str, *, remote: bool) -> SpanContext:
            return SpanContext(int(span.context.trace_id, 16), int(span_id, 16), remote, TraceFlags(TraceFlags.SAMPLED))

        return ReadableSpan(
            name=span.name,
            context=context(span.context.span_id, remote=False),
            parent=context(span.parent_id, remote=True) if span.parent_id else None,
            resource=self._resource,
            attributes=dict(span.attributes),
            kind=SpanKind.SERVER if span.server else SpanKind.INTERNAL,
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
            start_time=int(span.began * 1e9),
            end_time=int(max(span.began, span.ended) * 1e9),
            instrumentation_scope=self._scope,
        )
