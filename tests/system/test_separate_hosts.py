"""A system on three hosts, of which any may be lost without a request.

a has the head, the encoder and a decoder, b a denoiser, c another denoiser and another decoder.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.system.conftest import BOUND_S, ROOT, back
from tests.system.reference import diffusers_reference, pixels
from triptych.engines.parameters.serving_config import load_serving_config
from triptych.tools.chaos.clock import Clock
from triptych.tools.hosts.cluster import HostsCluster, launch_on_hosts

pytestmark = pytest.mark.timeout(300)
PROMPT = "a large red circle on the left of a blue background"
SEEDS = range(6)
STEPS = 300
"""So many that a fault finds them being computed."""


@pytest.mark.shared_cluster("hosts")
def test_an_image_over_three_hosts_is_bit_identical_to_what_diffusers_makes_alone(
    on_cluster: Callable[..., Any], models: Callable[[str], Path]
) -> None:
    async def scenario(cluster: HostsCluster) -> None:
        model = models("flux")
        expected = diffusers_reference("flux", model, PROMPT, 11, **load_serving_config(model).defaults)
        made = await asyncio.gather(*(cluster.generate(PROMPT, seed=11) for _ in range(4)))
        assert all(np.array_equal(pixels(image), expected) for image in made)
        status = await cluster.status()
        hosts = {row["component"]: row["host"] for row in status["actors"]}
        assert {hosts["encoder-0"], hosts["denoiser-0"], hosts["denoiser-1"], hosts["head"]} == {"a", "b", "c"}
        assert {pool["name"] for pool in status["pools"]} == {"pool-a", "pool-b", "pool-c"}

    on_cluster(scenario)


@pytest.mark.shared_cluster("hosts")
@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda cluster: cluster.hosts.isolate("b"), id="cut off"),
        pytest.param(lambda cluster: cluster.hosts.one_way("b", "a"), id="reports lost", marks=pytest.mark.hosts),
        pytest.param(lambda cluster: cluster.hosts.one_way("a", "b"), id="orders lost", marks=pytest.mark.hosts),
        pytest.param(lambda cluster: cluster.hosts.partition("b", "c"), id="peers apart", marks=pytest.mark.hosts),
        pytest.param(lambda cluster: cluster.hosts.link_down("b"), id="cable pulled", marks=pytest.mark.hosts),
        pytest.param(lambda cluster: cluster.hosts.lose(5), id="some lost", marks=pytest.mark.hosts),
    ],
)
def test_what_a_host_computed_that_cannot_be_reached_is_computed_elsewhere(
    fault: Callable[[HostsCluster], Any], on_cluster: Callable[..., Any]
) -> None:
    async def scenario(cluster: HostsCluster) -> None:
        expected = await made(cluster)
        asked = asyncio.create_task(made(cluster))
        await computing(cluster, "denoiser-0")
        with fault(cluster):
            assert await asked == expected
        await everything_ready(cluster)
        assert await made(cluster) == expected

    on_cluster(scenario)


@pytest.mark.shared_cluster("hosts")
@pytest.mark.hosts
def test_a_host_that_stops_is_replaced_and_goes_on_afterwards(on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: HostsCluster) -> None:
        expected = await made(cluster)
        asked = asyncio.create_task(made(cluster))
        await computing(cluster, "denoiser-0")
        cluster.hosts.signal("b", signal.SIGSTOP)
        assert await asked == expected
        cluster.hosts.signal("b", signal.SIGCONT)
        await everything_ready(cluster)

    on_cluster(scenario)


@pytest.mark.shared_cluster("hosts")
@pytest.mark.hosts
@pytest.mark.parametrize("seconds", [2, 40])
def test_a_long_cut_from_the_head_is_healed(seconds: int, on_cluster: Callable[..., Any]) -> None:
    async def scenario(cluster: HostsCluster) -> None:
        expected = await made(cluster)
        with cluster.hosts.partition("a", "b"):
            # Time itself is the event here: the kernel's timeouts grow with it.
            await asyncio.sleep(seconds)
        await everything_ready(cluster)
        assert await made(cluster) == expected

    on_cluster(scenario)


@pytest.mark.shared_cluster("hosts")
@pytest.mark.parametrize(
    "host", ["b", pytest.param("c", marks=pytest.mark.hosts), pytest.param("a", marks=pytest.mark.hosts)]
)
def test_a_host_that_is_switched_off_under_load_loses_nothing_and_comes_back(
    host: str, on_cluster: Callable[..., Any]
) -> None:
    async def scenario(cluster: HostsCluster) -> None:
        expected = await made(cluster)
        victim = next(c.name for c in cluster.topology.on_host(host) if c.slots)
        generation = (await cluster.child(victim)).generation
        ids = await accepted(cluster) if host == "a" else []
        asked = None if ids else asyncio.create_task(made(cluster))
        await computing(cluster, "denoiser-0")
        cluster.kill_host(host)
        if asked:
            assert await asked == expected
        cluster.restart_host(host)
        await back(cluster, victim, after_generation=generation)
        for request_id in ids:
            await done(cluster, request_id)
        assert await made(cluster) == expected

    on_cluster(scenario)


@pytest.mark.hosts
@pytest.mark.skipif(bool(Clock.why_unsupported()), reason=Clock.why_unsupported())
def test_the_clocks_of_hosts_may_differ_by_an_hour(topology_file: Callable[..., Path], tmp_path: Path) -> None:
    clocks = {}
    for host, hours in (("b", 1), ("c", -1)):
        (folder := tmp_path / host).mkdir()
        clock = Clock(folder)
        clock.step(hours * 3600)
        clocks[host] = clock.environment()
    path = topology_file(
        hosts={"encoder": ["a"], "denoiser": ["b"], "decoder": ["c"]},
        head={"host": "a"},
        transfer={"trusted_network": True},
    )

    async def scenario() -> None:
        async with launch_on_hosts(path, shared=[tmp_path], environments=clocks) as cluster:
            hours = [
                round((float(cluster.hosts.run(host, "env", *own, "date", "+%s")) - float(now)) / 3600)
                for host in ("b", "c")
                if (now := cluster.hosts.run("a", "date", "+%s"))
                and (own := [f"{name}={value}" for name, value in clocks[host].items()])
            ]
            assert hours == [1, -1]
            first = await cluster.generate(PROMPT, seed=1, deadline_s=60.0)
            cluster.kill_host("b")
            asked = asyncio.create_task(cluster.generate(PROMPT, seed=1))
            cluster.restart_host("b")
            assert (await asked).data == first.data

    asyncio.run(scenario())


async def made(cluster: HostsCluster) -> list[bytes]:
    """The files of some images that are asked for at once."""
    images = await asyncio.gather(*(cluster.generate(PROMPT, seed=seed, steps=STEPS) for seed in SEEDS))
    return [image.data for image in images]


async def accepted(cluster: HostsCluster) -> list[str]:
    """The ids of as many requests that nobody waits for."""
    ids = []
    async with cluster.http_client(BOUND_S) as http:
        for seed in SEEDS:
            body = {"prompt": PROMPT, "seed": seed, "num_inference_steps": STEPS}
            answer = await http.post("/v1/images/generations", json=body, headers={"Prefer": "respond-async"})
            ids.append(answer.raise_for_status().json()["id"])
    return ids


async def done(cluster: HostsCluster, request_id: str) -> None:
    async with asyncio.timeout(BOUND_S):
        while (state := (await cluster.request(request_id))["state"]) != "DONE":
            assert state not in ("FAILED", "TIMED_OUT", "CANCELLED")
            await asyncio.sleep(0.05)


async def computing(cluster: HostsCluster, name: str) -> None:
    """Until an instance has something to compute."""
    async with asyncio.timeout(BOUND_S):
        while True:
            status = await cluster.status()
            if any(row["name"] == name and row.get("running") for row in status["actors"]):
                return
            await asyncio.sleep(0.01)


async def everything_ready(cluster: HostsCluster) -> None:
    """Until the head has every instance."""
    names = {component.name for component in cluster.topology.components if component.slots}
    async with asyncio.timeout(BOUND_S):
        while True:
            status = await cluster.status()
            instances = status["head"]["instances"] if status["head"] else []
            if status["ready"] and {instance["name"] for instance in instances} == names:
                return
            await asyncio.sleep(0.05)


@pytest.mark.hosts
@pytest.mark.timeout(560)
def test_a_storm_of_faults_of_hosts_and_their_network_breaks_no_promise(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    command = (sys.executable, "-m", "triptych.tools.chaos", "--hosts", "3", "--json", str(report))
    options = ("--seed", "7", "--duration", "30", "--rate", "2", "--every", "3", "--bound", "120")
    storm = subprocess.run([*command, *options], cwd=ROOT, check=False)
    found = json.loads(report.read_text())
    assert {name: broken for name, broken in found["invariants"].items() if broken} == {}
    assert len(found["invariants"]) == 10, "what is checked on one machine alone is not said to hold"
    assert storm.returncode == 0
    assert found["accepted"] > 20
    assert sum(found["faults"].values()) >= 5
