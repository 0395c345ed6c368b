"""Server-sent events of a running system, with OpenAI's client and without."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import openai
import pytest

from tests.system.conftest import BOUND_S
from triptych.api.launch import Cluster

STEPS = 200
ASYNC = {"Prefer": "respond-async"}


def client_of(cluster: Cluster) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=BOUND_S, max_retries=0)


@pytest.mark.shared_cluster("killed")
def test_openais_client_gets_partial_images_and_then_the_image(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        plain = await cluster.generate("a red circle", seed=4, steps=STEPS)
        async with client_of(cluster) as client:
            stream = await client.images.generate(
                prompt="a red circle", stream=True, partial_images=2,
                extra_body={"seed": 4, "num_inference_steps": STEPS},
            )  # fmt: skip
            events = [event async for event in stream]
        assert [event.type for event in events] == [
            "image_generation.partial_image", "image_generation.partial_image", "image_generation.completed",
        ]  # fmt: skip
        assert [event.partial_image_index for event in events[:2]] == [0, 1]
        images = [base64.b64decode(event.b64_json) for event in events]
        assert len(set(images)) == 3
        assert images[-1] == plain.data
        assert (events[-1].output_format, events[-1].usage.total_tokens) == ("png", 0)

    on_cluster(scenario)


async def sent_events(answer: httpx.Response) -> AsyncIterator[tuple[str, str, dict[str, Any]]]:
    """Id, name and data of each event."""
    fields: dict[str, str] = {}
    async for line in answer.aiter_lines():
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif "data" in fields:
            yield fields.get("id", ""), fields["event"], json.loads(fields["data"])
            fields = {}


@pytest.mark.shared_cluster("killed")
def test_a_stream_of_events_goes_on_where_it_was_cut(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=BOUND_S) as http:
            body = {"prompt": "x", "seed": 3, "num_inference_steps": STEPS}
            id_ = (await http.post("/v1/images/generations", json=body, headers=ASYNC)).json()["id"]
            first, second = list[Any](), list[Any]()
            async with http.stream("GET", f"/v1/requests/{id_}/events") as answer:
                async for event in sent_events(answer):
                    first.append(event)
                    if event[0] and event[1] == "step":
                        break
            async with http.stream(
                "GET", f"/v1/requests/{id_}/events", headers={"Last-Event-ID": first[-1][0]}
            ) as answer:
                second += [event async for event in sent_events(answer)]
        states = [data["state"] for _, name, data in first + second if name == "state"]
        assert states == list(dict.fromkeys(states)), "none is sent twice"
        assert (states[0], states[-1]) == ("ENCODER_WAITING", "DONE")
        steps = [data["step"] for _, name, data in first + second if name == "step"]
        assert steps == sorted(set(steps))
        assert second[-1][1] == "ended"
        assert second[-1][2]["units"][0]["artifact"]["url"].startswith(cluster.url)

    on_cluster(scenario)


@pytest.mark.shared_cluster("killed")
def test_a_client_that_hangs_up_on_a_stream_cancels_its_request(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=BOUND_S) as http:
            body = {"prompt": "x", "num_inference_steps": 20 * STEPS, "stream": True, "partial_images": 3}
            async with http.stream("POST", "/v1/images/generations", json=body) as answer:
                id_ = answer.headers["x-request-id"]
            async with asyncio.timeout(BOUND_S):
                async with http.stream("GET", f"/v1/requests/{id_}/events") as answer:
                    *_, (_, name, request) = [event async for event in sent_events(answer)]
        assert (name, request["state"]) == ("ended", "CANCELLED")
        assert request["units"][0]["history"][-1]["reason"] == "the client hung up"

    on_cluster(scenario)


@pytest.mark.shared_cluster("killed")
def test_a_killed_process_is_seen_to_fall_and_to_come_back(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        victim = (await cluster.children())["denoiser-1"]
        async with (
            asyncio.timeout(BOUND_S),
            httpx.AsyncClient(base_url=cluster.url, timeout=BOUND_S) as http,
            http.stream("GET", "/v1/cluster/events") as answer,
        ):
            events = sent_events(answer)
            _, name, first = await anext(events)
            assert (name, first["ready"]) == ("cluster", True)
            os.kill(victim.pid, signal.SIGKILL)
            changes = []
            async for _, name, row in events:
                changes += [row] if name == "component" else []
                if changes and changes[-1]["state"] == "ready":
                    break
        assert {row["component"] for row in changes} == {"denoiser-1"}
        assert changes[0]["state"] != "ready"
        assert changes[0]["reason"] == "killed by SIGKILL"
        assert (changes[-1]["restarts"], changes[-1]["pid"] > 0) == (victim.restarts + 1, True)
        assert changes[-1]["generation"] > victim.generation

    on_cluster(scenario)
