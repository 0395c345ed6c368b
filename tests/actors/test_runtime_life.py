"""Starting, stopping and looking at the actors of a process."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import pytest

from tests.actors.bench import (
    Bench,
    Starting,
    Worker,
    ask,
    run,
)
from triptych.actors import ActorCrashed, StartDelayed, StartFailure
from triptych.actors.diagnostics import dump
from triptych.actors.heartbeat import state_of
from triptych.actors.system import (
    ActorStatus,
    Inspect,
    Inspection,
    Shutdown,
    ShuttingDown,
)


def test_system_messages_are_answered_while_the_actor_loads(folder: Path) -> None:
    async def scenario() -> None:
        slow = Starting("slow")
        bench = Bench(folder, slow)
        running = asyncio.create_task(bench.runtime.run())
        await slow.loading.wait()
        reference = bench.reference("slow")
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
        bench = Bench(folder, slow)
        running = asyncio.create_task(bench.runtime.run())
        await slow.loading.wait()
        bench.runtime.stop("test")
        await running

    run(scenario())


def test_a_start_failure_comes_out_as_itself_and_any_other_error_as_a_crash(folder: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(StartFailure, match="no model here"):
            await Bench(folder, Starting("a", StartFailure("no model here")), Starting("b")).runtime.run()
        with pytest.raises(ActorCrashed, match="a crashed: OSError: gone"):
            await Bench(folder, Starting("a", OSError("gone")), Starting("b")).runtime.run()

    run(scenario())


def test_two_processes_cannot_serve_one_address(folder: Path) -> None:
    async def scenario() -> None:
        async with Bench(folder, Worker("worker")).runtime:
            with pytest.raises(StartDelayed, match="served by a live process"):
                await Bench(folder, Worker("worker")).runtime.run()

    run(scenario())


def test_a_process_is_ready_when_every_actor_of_it_is() -> None:
    async def scenario() -> None:
        first, second = Worker("role"), Worker("role.stream")
        second.state, second.detail = "loading", "weights"
        assert state_of((first, second)) == ("loading", "role.stream: weights")
        first.state = "ready"
        assert state_of((first, second)) == ("loading", "role.stream: weights")
        second.state = "ready"
        assert state_of((first, second)) == ("ready", "")
        first.state, first.detail = "joining", "waits for the head"
        assert state_of((first, second)) == ("joining", "waits for the head")

    run(scenario())


def test_a_state_of_its_own_outlives_the_start(folder: Path) -> None:
    async def scenario() -> None:
        bench = Bench(folder, Worker("worker"), Worker("peer"))
        async with bench.runtime:
            worker, peer = bench.runtime.inspection().actors
            assert (worker.state, peer.state, peer.detail) == ("ready", "joining", "waits for worker")

    run(scenario())


def test_the_dump_shows_mailboxes_and_stacks(folder: Path) -> None:
    async def scenario() -> None:
        worker = Worker("worker")
        bench = Bench(folder, worker)
        async with bench.runtime:
            waiting = asyncio.create_task(ask(bench.reference("worker"), "wait"))
            await worker.entered.wait()
            text = io.StringIO()
            dump(bench.runtime, text)
            assert "worker generation 7: ready" in text.getvalue()
            assert "await self.gate.wait()" in text.getvalue()
            worker.gate.set()
            await waiting

    run(scenario())


def test_an_error_outside_of_a_runtime_is_raised_where_it_happens() -> None:
    worker = Worker("worker")
    with pytest.raises(LookupError):
        worker._on_crash(LookupError("nobody else would see it"))
