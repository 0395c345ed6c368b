"""The head watches instances and pools, and releases blocks that no job needs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from tests.roles.head.head_harness import BOUND_S, Pool, run_scenario, running_head
from triptych.actors import Topology
from triptych.bus import RemoteError
from triptych.engines.stages import Stage
from triptych.roles.head import monitor
from triptych.roles.messages import pool as pools
from triptych.roles.messages import requests, stages
from triptych.roles.messages.common import (
    Attempt,
    LeaseRef,
    StoredPayload,
)


def test_an_instance_that_is_not_registered_is_told_to_register(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            with pytest.raises(RemoteError, match="register again") as refused:
                await harness.report(stages.InstanceHeartbeat(), "encoder-0")
            assert refused.value.code == "unknown"

    run_scenario(scenario())


def test_an_instance_that_falls_silent_is_fenced(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            await harness.first_attempt(generation=5)
            view = await harness.head.ask(requests.WaitRequest("r", 0.0), requests.RequestView, timeout_s=BOUND_S)
            async with asyncio.timeout(BOUND_S):
                while view.units[0].attempts == 1:
                    view = await harness.view()
            with pytest.raises(RemoteError, match="given up") as refused:
                await harness.report(stages.InstanceHeartbeat(), "encoder-0", 5)
            assert refused.value.code == "fenced"
            with pytest.raises(RemoteError, match="given up"):
                await harness.register("encoder-0", generation=5)
            await harness.register("encoder-0", generation=6)
            assert (await harness.next_attempt("encoder-0")).number == 2

    run_scenario(scenario())


def test_after_a_pause_of_the_machine_no_instance_is_fenced_before_its_heartbeat(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    paused_s = [0.0]
    clock = SimpleNamespace(time=time.time, monotonic=lambda: time.monotonic() + sum(paused_s))
    monkeypatch.setattr("triptych.roles.head.head.time", clock)

    async def scenario() -> None:
        async with running_head(topology(supervision="heartbeat_timeout_s = 60")) as harness:
            await harness.first_attempt()
            (scheduler,) = harness.actor.models.schedulers
            for _ in range(2):
                paused_s.append(100.0)  # the next tick comes late by as much
                async with asyncio.timeout(BOUND_S):
                    while scheduler.jobs.clock.now < sum(paused_s):
                        await harness.view()
                await harness.report(stages.InstanceHeartbeat(), "encoder-0")
            assert (await harness.view()).units[0].attempts == 1

    run_scenario(scenario())


def test_the_reason_that_an_instance_reports_is_why_the_head_is_not_ready(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology(supervision="")) as harness:

            async def reasons() -> str:
                view = await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
                return " ".join(view.reasons)

            await harness.register("decoder-0")
            await harness.report(stages.InstanceHeartbeat("the disk is full"), "decoder-0")
            assert "decoder-0: the disk is full" in await reasons()
            await harness.report(stages.InstanceHeartbeat(), "decoder-0")
            assert "full" not in await reasons()

    run_scenario(scenario())


def test_a_pool_that_refuses_is_asked_again_after_ever_longer_pauses(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[int] = []
    monkeypatch.setattr(monitor, "backoff_s", lambda attempt: pauses.append(attempt) or 0.0)

    async def scenario() -> None:
        pool = Pool("pool")
        pool.refuses = 3
        async with running_head(topology(), pool=pool) as harness, asyncio.timeout(BOUND_S):
            while harness.actor.monitor.pools_missing():
                await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
        assert pauses == [0, 1, 2]

    run_scenario(scenario())


@pytest.mark.parametrize(("generation", "goes_on_at"), [(1, "denoiser-0"), (2, "encoder-0")])
def test_a_pool_whose_connection_was_lost_is_asked_before_what_it_has_is_made_again(
    topology: Callable[..., Topology], monkeypatch: pytest.MonkeyPatch, generation: int, goes_on_at: str
) -> None:
    monkeypatch.setattr(monitor, "ASK_AGAIN_S", BOUND_S)

    async def scenario() -> None:
        async with running_head(topology(supervision="")) as harness, asyncio.timeout(BOUND_S):
            while harness.actor.monitor.pools_missing():
                await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
            encoded = await harness.first_attempt()
            stored = StoredPayload(LeaseRef("pool", 1, 7, 0, 64), b"", 0, 64)
            await harness.report(stages.StageOutputsStored(encoded, Stage.ENCODER, stored, 0.1, issued=3))
            await harness.kill_pool()
            while not harness.actor.monitor.pools_missing():  # else the denoiser could get the attempt before
                await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
            again = Pool("pool")
            again.says_generation = generation
            async with harness.start_pool(again):
                await harness.register("denoiser-0")
                assert (await harness.next_attempt(goes_on_at)).number == generation
                while harness.actor.monitor.pools_missing():
                    await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)

    run_scenario(scenario())


def test_blocks_that_their_owner_does_not_know_are_released(topology: Callable[..., Topology]) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness:
            present = await harness.first_attempt(generation=4)
            old, claimed, spare = Attempt("old/0", 1), Attempt("claimed/0", 1), Attempt("", 1)
            harness.workers["encoder-0"].taken.add(claimed)
            owners = [(old, 4), (claimed, 4), (present, 4), (spare, 4), (old, 3)]
            harness.pool.held = tuple(
                pools.LeaseView(LeaseRef("pool", 1, number, 0, 64), "writing", "encoder-0", generation, attempt)
                for number, (attempt, generation) in enumerate(owners)
            )
            async with asyncio.timeout(BOUND_S):
                while harness.actor.monitor.pools_missing():
                    await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
                await harness.actor.monitor.reclaim()
            assert [lease.lease_id for lease in harness.pool.released.get_nowait()] == [0]
            assert harness.pool.released.empty()

    run_scenario(scenario())


def test_pools_may_come_and_go_while_their_leases_are_listed(
    topology: Callable[..., Topology],
) -> None:
    async def scenario() -> None:
        async with running_head(topology()) as harness, asyncio.timeout(BOUND_S):
            while harness.actor.monitor.pools_missing():
                await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
            harness.pool.silent = True
            looking = asyncio.create_task(harness.actor.monitor.reclaim())
            await harness.pool.asked_for_leases.wait()
            harness.actor.monitor._pools["another"] = 1
            await harness.kill_pool()
            await looking
            while "pool" not in harness.actor.monitor.pools_missing():
                await harness.head.ask(requests.ClusterQuery(), requests.ClusterView, timeout_s=BOUND_S)
            (scheduler,) = harness.actor.models.schedulers
            assert scheduler.registry.pools_away == {"pool"}, "who uses it gets no jobs"

    run_scenario(scenario())
