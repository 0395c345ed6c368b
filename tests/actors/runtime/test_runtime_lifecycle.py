"""Starting, stopping and looking at the actors of a process."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest

from tests.actors.runtime.runtime_harness import (
    RuntimeHarness,
    Starting,
    Worker,
    ask,
    run,
)
from triptych.actors import ActorCrashedError, StartDelayedError, StartError
from triptych.actors.runtime.diagnostics import dump_tasks
from triptych.actors.runtime.heartbeat import process_state
from triptych.actors.runtime.system_messages import (
    ActorStatus,
    Inspect,
    Inspection,
    Shutdown,
    ShuttingDown,
)


def test_system_messages_are_answered_while_the_actor_loads(folder: Path) -> None:
    async def scenario() -> None:
        slow = Starting("slow")
        harness = RuntimeHarness(folder, slow)
        running = asyncio.create_task(harness.runtime.run())
        await slow.loading.wait()
        reference = harness.reference("slow")
        (status,) = (await reference.ask(Inspect(), Inspection, timeout_s=5)).actors
        assert isinstance(status, ActorStatus)
        assert (status.name, status.kind, status.state, status.generation) == ("slow", "test", "loading", 7)
        slow.gate.set()
        while (await reference.ask(Inspect(), Inspection, timeout_s=5)).actors[0].state != "ready":
            pass
        assert await reference.ask(Shutdown("test"), ShuttingDown, timeout_s=5) == ShuttingDown()
        await running

    run(scenario())


def test_a_stop_while_loading_gives_up_the_load(folder: Path) -> None:
    async def scenario() -> None:
        slow = Starting("slow")
        harness = RuntimeHarness(folder, slow)
        running = asyncio.create_task(harness.runtime.run())
        await slow.loading.wait()
        harness.runtime.stop("test")
        await running

    run(scenario())


def test_a_start_failure_comes_out_as_itself_and_any_other_error_as_a_crash(folder: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(StartError, match="no model here"):
            await RuntimeHarness(folder, Starting("a", StartError("no model here")), Starting("b")).runtime.run()
        with pytest.raises(ActorCrashedError, match="a crashed: OSError: gone"):
            await RuntimeHarness(folder, Starting("a", OSError("gone")), Starting("b")).runtime.run()

    run(scenario())


def test_two_processes_cannot_serve_one_address(folder: Path) -> None:
    async def scenario() -> None:
        async with RuntimeHarness(folder, Worker("worker")).runtime:
            with pytest.raises(StartDelayedError, match="served by a live process"):
                await RuntimeHarness(folder, Worker("worker")).runtime.run()

    run(scenario())


def test_a_process_is_ready_when_every_actor_of_it_is() -> None:
    async def scenario() -> None:
        first, second = Worker("role"), Worker("role.stream")
        second.state, second.detail = "loading", "weights"
        assert process_state((first, second)) == ("loading", "role.stream: weights")
        first.state = "ready"
        assert process_state((first, second)) == ("loading", "role.stream: weights")
        second.state = "ready"
        assert process_state((first, second)) == ("ready", "")
        first.state, first.detail = "joining", "waits for the head"
        assert process_state((first, second)) == ("joining", "waits for the head")

    run(scenario())


def test_a_state_of_its_own_outlives_the_start(folder: Path) -> None:
    async def scenario() -> None:
        harness = RuntimeHarness(folder, Worker("worker"), Worker("peer"))
        async with harness.runtime:
            worker, peer = harness.runtime.inspection().actors
            assert (worker.state, peer.state, peer.detail) == ("ready", "joining", "waits for worker")

    run(scenario())


def test_the_dump_shows_mailboxes_and_stacks(folder: Path) -> None:
    async def scenario() -> None:
        worker = Worker("worker")
        harness = RuntimeHarness(folder, worker)
        async with harness.runtime:
            waiting = asyncio.create_task(ask(harness.reference("worker"), "wait"))
            await worker.entered.wait()
            text = io.StringIO()
            dump_tasks(harness.runtime, text)
            assert "worker generation 7: ready" in text.getvalue()
            assert "await self.gate.wait()" in text.getvalue()
            worker.gate.set()
            await waiting

    run(scenario())


def test_an_error_outside_of_a_runtime_is_raised_where_it_happens() -> None:
    worker = Worker("worker")
    with pytest.raises(LookupError):
        worker._on_crash(LookupError("nobody else would see it"))
