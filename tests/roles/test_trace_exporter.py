"""Spans reach a receiver of OTLP, and nothing depends on whether there is one."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import pytest

from tests.otlp_receiver import otlp_receiver
from triptych.actors import StartError
from triptych.actors.topology.sections import OtelSection
from triptych.roles.trace_exporter import endpoint_of_environment, exporter_of
from triptych.roles.tracing import TraceContext, TraceSpan

TRACE = "a" * 32


def span(name: str, **more: Any) -> TraceSpan:
    return TraceSpan(TraceContext(TRACE, "b" * 16), name, 100.25, 101.5, **more)


def test_a_span_arrives_as_it_was_made_also_the_last_one(
    run: Any, make_topology: Any, local_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body() -> None:
        async with otlp_receiver() as (receiver, url), local_cluster(make_topology()) as h:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
            component = h.topology.component("denoiser-0")
            exporter = exporter_of(component, h.topology)
            assert exporter is not None
            await h.start(exporter)
            exporter.export([span("step", parent_id="c" * 16, attributes={"triptych.step": 3})])
            exporter.export([span("POST", error="status 503", server=True)])
            await h.stop(exporter.name)
            step, post = receiver.spans
            assert step._replace(attributes={}) == (
                "triptych-denoiser", "denoiser-0", TRACE, "b" * 16, "c" * 16, "step", 100.25, 101.5, {}, "", False,
            )  # fmt: skip
            assert step.attributes == {"triptych.step": 3}
            assert (post.parent_id, post.error, post.server) == ("", "status 503", True)

    run(body())


def test_a_receiver_that_is_not_there_keeps_nobody_waiting(
    run: Any, make_topology: Any, local_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("triptych.roles.trace_exporter.LAST_SPANS_S", 0.1)

    async def body() -> None:
        async with local_cluster(make_topology()) as h:
            exporter = exporter_of(h.topology.component("denoiser-0"), h.topology)
            assert exporter is not None
            await h.start(exporter)
            exporter.export([span("step")] * 3000)
            await h.stop(exporter.name)
            assert exporter.stats() == {"spans": 3000}

    run(body())


@pytest.mark.parametrize(
    ("environment", "endpoint"),
    [
        ({}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318"}, "http://a:4318"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://b"}, "http://b"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://a:4318", "OTEL_SDK_DISABLED": "true"}, ""),
    ],
)
def test_the_variables_of_opentelemetry_say_where_spans_go(environment: dict[str, str], endpoint: str) -> None:
    assert endpoint_of_environment(environment) == endpoint


def test_a_topology_that_asks_for_traces_needs_the_package(make_topology: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    plain = make_topology()
    topology = msgspec.structs.replace(plain, otel=OtelSection(endpoint="http://127.0.0.1:9"))
    with pytest.raises(StartError, match=r'pip install "triptych\[otel\]"'):
        exporter_of(topology.component("head"), topology)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert exporter_of(plain.component("head"), plain) is None, "the variable may be meant for others"
