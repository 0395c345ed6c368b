"""A webhook arrives, whoever is killed meanwhile: its receiver, the API, the head."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from standardwebhooks import Webhook

from tests.system.conftest import BOUND_S, ROOT, WEBHOOK_SECRET, back
from triptych.api.launch import Cluster


class Receiver:
    """A receiver in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.port = port

    async def until(self, ids: set[str]) -> dict[str, dict[str, Any]]:
        """Wait until a webhook of each of these requests has come; returns the first of each, verified."""
        assert self.process.stdout
        found: dict[str, dict[str, Any]] = {}
        async with asyncio.timeout(BOUND_S):
            while found.keys() != ids:
                came = json.loads(await self.process.stdout.readline())
                event = Webhook(WEBHOOK_SECRET).verify(came["body"], came["headers"])
                found.setdefault(came["headers"]["webhook-id"], event)
        return found


@asynccontextmanager
async def receiving(status: int, port: int = 0) -> AsyncIterator[Receiver]:
    """Start a receiver that answers with a status; it is killed at the end."""
    module = ("-m", "tests.api.webhook_receiver", str(port), str(status))
    process = await asyncio.create_subprocess_exec(
        sys.executable, *module, cwd=ROOT, stdout=asyncio.subprocess.PIPE, limit=1 << 20
    )
    try:
        assert process.stdout
        async with asyncio.timeout(BOUND_S):
            yield Receiver(process, int(await process.stdout.readline()))
    finally:
        process.kill()
        await process.wait()


async def until_recorded(http: httpx.AsyncClient, count: int) -> None:
    """Wait until the head that was started last knows of so many webhooks that they have arrived."""
    async with asyncio.timeout(BOUND_S):
        while True:
            families = text_string_to_metric_families((await http.get("/metrics")).text)
            samples = [sample for family in families for sample in family.samples]
            found = [s.value for s in samples if s.labels.get("outcome") == "delivered"]
            if sum(found) >= count:
                return
            await asyncio.sleep(0.05)


@pytest.mark.shared_cluster("killed")
def test_a_webhook_arrives_after_its_receiver_the_api_and_the_head_were_killed(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=BOUND_S) as http:
            async with receiving(500) as receiver:
                hook = {"webhook_url": f"http://127.0.0.1:{receiver.port}/hook"}
                task = {"prompt": "a red circle", "infer_steps": 4, "seed": 3, "aspect_ratio": "16:9", **hook}
                done = (await http.post("/v1/tasks/image/", json=task)).json()["task_id"]
                long = {"prompt": "a long one", "num_inference_steps": 4000, **hook}
                answer = await http.post("/v1/images/generations", json=long, headers={"Prefer": "respond-async"})
                cancelled = answer.json()["id"]
                await http.delete(f"/v1/requests/{cancelled}")
                await receiver.until({done, cancelled})
            assert (await http.get(f"/v1/tasks/{done}/status")).json()["status"] == "completed"
            assert (await http.get(f"/v1/tasks/{done}/result")).headers["content-type"] == "image/png"
            children = await cluster.children()
            for victim in ("api", "head"):
                os.kill(children[victim].pid, signal.SIGKILL)
            for victim in ("api", "head"):
                await back(cluster, victim, after_generation=children[victim].generation)
            await cluster.wait_ready(BOUND_S)
            async with receiving(204, receiver.port) as receiver:
                events = await receiver.until({done, cancelled})
                await until_recorded(http, 2)
            assert {id_: event["type"] for id_, event in events.items()} == {
                done: "request.completed",
                cancelled: "request.cancelled",
            }
            for id_, event in events.items():
                assert event["data"] == (await http.get(f"/v1/requests/{id_}")).json()

    on_cluster(scenario)
