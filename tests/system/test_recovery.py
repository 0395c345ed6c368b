"""Real processes killed with real signals."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from triptych.api.launch import Cluster, launch

FREE_PORTS = {"api": {"port": 0}}
BOUND_S = 30.0


async def back(cluster: Cluster, name: str, *, after_generation: int) -> None:
    """Until the component is ready in a later generation."""
    async with asyncio.timeout(BOUND_S):
        while True:
            child = (await cluster.children())[name]
            if child.generation > after_generation and child.state == "ready":
                return


@pytest.mark.parametrize("victim", ["denoiser-0", "head", "pool", "api"])
def test_a_killed_process_is_back_with_a_higher_generation_and_requests_succeed(
    victim: str, topology_file: Callable[..., Path]
) -> None:
    async def scenario() -> None:
        path = topology_file(roles={"encoder": 1, "denoiser": 2, "decoder": 1})
        async with launch(path, FREE_PORTS) as cluster:
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

    asyncio.run(scenario())


def test_requests_under_way_survive_the_death_of_every_kind_of_process(topology_file: Callable[..., Path]) -> None:
    async def scenario() -> None:
        # Without a cache, so that each request is encoded and an encoder has something to lose.
        path = topology_file(roles={"encoder": 1, "denoiser": 2, "decoder": 1}, model={"prompt_cache": "0"})
        async with launch(path, FREE_PORTS) as cluster:
            expected = [(await cluster.generate("a red circle", seed=s, steps=20)).data for s in range(2)]
            for victim in ("denoiser-0", "encoder-0", "decoder-0", "pool", "head"):
                children = await cluster.children()
                asked = [asyncio.create_task(cluster.generate("a red circle", seed=k % 2, steps=20)) for k in range(6)]
                await some_work_under_way(cluster)
                os.kill(children[victim].pid, signal.SIGKILL)
                got = [(await one).data for one in asked]
                assert got == [expected[k % 2] for k in range(6)], victim
                await back(cluster, victim, after_generation=children[victim].generation)

    asyncio.run(scenario())


async def some_work_under_way(cluster: Cluster) -> None:
    async with asyncio.timeout(BOUND_S):
        while not (await cluster.status())["head"]["states"]:
            pass
