"""One trace for each request: over HTTP, the head and the roles, also when a denoiser is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.otlp_receiver import OtlpReceiver, Received, otlp_receiver
from tests.system.conftest import BOUND_S, back
from tests.system.test_recovery import checkpointed
from triptych.api.launch import Cluster

POST = "POST /v1/images/generations"
CLIENT = "b7ad6b7169203331"
"""The client's span."""


def trace_id(number: int) -> str:
    return f"{number:032x}"


def headers(number: int, flags: str = "01") -> dict[str, str]:
    return {"traceparent": f"00-{trace_id(number)}-{CLIENT}-{flags}"}


async def trace(receiver: OtlpReceiver, number: int, last: Counter[str]) -> list[Received]:
    """The spans of a trace, once there are as many of each name as in `last`: processes send them by themselves."""

    def complete(spans: list[Received]) -> bool:
        return Counter(span.name for span in spans if span.trace_id == trace_id(number)) >= last

    spans = await receiver.until(complete, BOUND_S)
    return sorted((span for span in spans if span.trace_id == trace_id(number)), key=lambda span: span.began)


def tree(spans: list[Received]) -> dict[str, list[str]]:
    """The names of the children of each span with children, by its name and, for an attempt, its instance."""
    by_id = {span.span_id: span for span in spans}
    assert len(by_id) == len(spans)
    found: dict[str, list[str]] = {}
    for span in spans:
        parent = by_id.get(span.parent_id)
        assert parent is not None or span.parent_id == CLIENT, f"{span.name} has no parent"
        found.setdefault(title(parent) if parent else "client", []).append(title(span))
        if parent is not None and parent.name not in ("client", POST):
            assert parent.began <= span.began, (parent, span)
            if span.name != "checkpoint":  # the stage goes on beside it, and may end before
                assert span.ended <= parent.ended, (parent, span)
    return found


def title(span: Received) -> str:
    return (
        span.attributes["triptych.instance"] if span.service == "triptych-head" and span.name in STAGES else span.name
    )


STAGES = ("encoder", "denoiser", "decoder")


@pytest.mark.shared_cluster("killed")
def test_a_request_is_one_trace_that_continues_the_clients_also_when_its_denoiser_is_killed(
    on_cluster: Callable[..., Any],
) -> None:
    async def scenario(cluster: Cluster) -> None:
        port = urlsplit(cluster.topology.otel.endpoint).port or 0
        async with (
            otlp_receiver(port) as (receiver, _),
            httpx.AsyncClient(base_url=cluster.url, timeout=BOUND_S) as http,
        ):
            body = {"prompt": "a traced red circle", "num_inference_steps": 3}
            answer = await http.post("/v1/images/generations", json=body, headers=headers(1))
            assert answer.headers["traceparent"].startswith(f"00-{trace_id(1)}-")
            whole = Counter({"step": 3, "run": 3, "load": 2, "store": 2, "save": 1, "request": 1, "decoder": 1})
            whole[POST] = 1
            spans = await trace(receiver, 1, whole)
            (encoder, denoiser, decoder) = [title(span) for span in spans if span.name in STAGES]
            found = tree(spans)
            assert found == {
                "client": [POST],
                POST: ["request"],
                "request": ["job"],
                "job": ["wait", encoder, "wait", denoiser, "wait", decoder],
                encoder: ["run", "store"],
                denoiser: found[denoiser],
                decoder: ["load", "run", "save"],
            }
            assert set(found[denoiser]) - {"checkpoint"} == {"load", "run", "step", "store"}
            assert [span.attributes["triptych.step"] for span in spans if span.name == "step"] == [1, 2, 3]
            (post,) = [span for span in spans if span.server]
            assert post.span_id == answer.headers["traceparent"].split("-")[2]
            assert post.attributes["http.response.status_code"] == 200
            assert not [span for span in spans if span.error]

            await http.post("/v1/images/generations", json=body)
            await http.post("/v1/images/generations", json=body, headers=headers(2, "00"))

            body = {"prompt": "a traced red circle, killed", "num_inference_steps": 1500}
            asked = asyncio.create_task(http.post("/v1/images/generations", json=body, headers=headers(3)))
            seen = await checkpointed(http)
            children, victim = await cluster.children(), seen["instances"]["denoiser"]
            os.kill(children[victim].pid, signal.SIGKILL)
            (await asked).raise_for_status()
            spans = await trace(receiver, 3, Counter({"denoiser": 2, POST: 1, "save": 1, "run": 3}))
            found, other = tree(spans), f"denoiser-{1 - int(victim[-1])}"
            assert [name for name in found["job"] if name != "wait"] == [encoder, victim, other, decoder]
            assert [span.error for span in spans if span.error] == [f"{victim}: its process ended"]
            assert "store" in found[other]
            assert "store" not in found.get(victim, [])
            assert {span.trace_id for span in receiver.spans} == {trace_id(1), trace_id(3)}, (
                "the others are not sampled"
            )
            await back(cluster, victim, after_generation=children[victim].generation)

    on_cluster(scenario)
