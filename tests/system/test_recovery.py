"""Real processes killed with real signals."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.system.conftest import BOUND_S, back
from triptych.api.launch import Cluster

pytestmark = pytest.mark.shared_cluster("killed")


@pytest.mark.parametrize("victim", ["denoiser-0", "head", "pool", "api"])
def test_a_killed_process_is_back_with_a_higher_generation_and_requests_succeed(
    victim: str, on_cluster: Callable[..., Any]
) -> None:
    async def scenario(cluster: Cluster) -> None:
        before = await cluster.generate("a red circle", seed=3)
        children = await cluster.children()
        os.kill(children[victim].pid, signal.SIGKILL)
        await back(cluster, victim, after_generation=children[victim].generation)
        await cluster.wait_ready(BOUND_S)
        after = await cluster.generate("a red circle", seed=3)
        assert after.data == before.data
        survivors = await cluster.children()
        assert {n: c.pid for n, c in survivors.items() if n != victim} == {
            n: c.pid for n, c in children.items() if n != victim
        }

    on_cluster(scenario)


def test_requests_under_way_survive_the_death_of_every_kind_of_process(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        for victim in ("denoiser-0", "encoder-0", "decoder-0", "pool", "head"):
            # Other prompts for each, so that they are encoded and an encoder has something to lose.
            prompts = [f"{k % 3} red circles, without {victim}" for k in range(6)]
            children = await cluster.children()
            asked = [asyncio.create_task(cluster.generate(prompt, seed=7, steps=20)) for prompt in prompts]
            await some_work_under_way(cluster)
            os.kill(children[victim].pid, signal.SIGKILL)
            got = [(await one).data for one in asked]
            await back(cluster, victim, after_generation=children[victim].generation)
            await cluster.wait_ready(BOUND_S)
            expected = [(await cluster.generate(prompt, seed=7, steps=20)).data for prompt in prompts[:3]]
            assert got == expected * 2, victim
            assert len(set(expected)) == 3

    on_cluster(scenario)


def test_a_killed_denoiser_loses_only_the_steps_after_its_last_checkpoint(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        asked = {"prompt": "a red circle", "seed": 5, "num_inference_steps": 1500}
        async with httpx.AsyncClient(base_url=cluster.url, timeout=BOUND_S) as http:
            expected = (await http.post("/v1/images/generations", json=asked)).json()
            answer = asyncio.create_task(http.post("/v1/images/generations", json=asked))
            seen = await checkpointed(http)
            children = await cluster.children()
            victim = seen["instances"]["denoiser"]
            os.kill(children[victim].pid, signal.SIGKILL)
            got = (await answer).json()
            assert got["data"] == expected["data"]
            (unit,) = (await http.get(f"/v1/requests/{got['id']}")).json()["units"]
            assert unit["attempts"] == 2
            assert unit["resumed_from"] >= seen["checkpoint_step"]
            assert 0 <= unit["steps_redone"] < 1500 - unit["resumed_from"]
            assert unit["instances"]["denoiser"] != victim
            await back(cluster, victim, after_generation=children[victim].generation)

    on_cluster(scenario)


async def checkpointed(http: httpx.AsyncClient) -> dict[str, Any]:
    """The one job under way, once a checkpoint of it is stored."""
    async with asyncio.timeout(BOUND_S):
        while True:
            for instance in (await http.get("/v1/cluster")).json()["head"]["instances"]:
                for job in instance["running"]:
                    (unit,) = (await http.get(f"/v1/requests/{job.partition('/')[0]}")).json()["units"]
                    if unit["checkpoint_step"]:
                        return dict(unit)


async def some_work_under_way(cluster: Cluster) -> None:
    async with asyncio.timeout(BOUND_S):
        while not (await cluster.status())["head"]["states"]:
            pass
