"""A long request gives its slot to a more urgent one, and goes on from there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.system.conftest import BOUND_S
from triptych.api.launch import Cluster

pytestmark = pytest.mark.shared_cluster("killed")
STEPS = 1000


def test_a_long_request_is_parked_for_an_urgent_one_and_has_the_same_bits(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: Cluster) -> None:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=BOUND_S) as http:

            async def make(**asked: Any) -> dict[str, Any]:
                answer = await http.post("/v1/images/generations", json={"prompt": "a red circle", **asked})
                return dict(answer.json())

            def long_ones() -> list[asyncio.Task[dict[str, Any]]]:
                """One for each of the two denoisers, which have one slot."""
                return [asyncio.create_task(make(seed=seed, num_inference_steps=STEPS)) for seed in (1, 2)]

            undisturbed = [(await task)["data"] for task in long_ones()]
            long = long_ones()
            await denoising(http, len(long))
            urgent = await make(seed=3, num_inference_steps=2, priority=1)
            assert "data" in urgent
            assert not any(task.done() for task in long), "it came last and was first"
            parked = []
            for task, expected in zip(long, undisturbed, strict=True):
                got = await task
                assert got["data"] == expected
                (unit,) = (await http.get(f"/v1/requests/{got['id']}")).json()["units"]
                if unit["parked"]:
                    parked.append(unit)
            (unit,) = parked
            assert unit["resumed_from"] > 0
            assert unit["attempts"] == 2
            assert "parked" in unit["causes"][0]

    on_cluster(scenario)


async def denoising(http: httpx.AsyncClient, count: int) -> None:
    """Return when as many jobs have taken a step."""
    async with asyncio.timeout(BOUND_S):
        while True:
            steps = [
                unit["step"]
                for instance in (await http.get("/v1/cluster")).json()["head"]["instances"]
                for job in instance["running"]
                for unit in (await http.get(f"/v1/requests/{job.partition('/')[0]}")).json()["units"]
            ]
            if sum(step > 0 for step in steps) == count:
                return
