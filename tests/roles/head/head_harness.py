"""A head for tests: a real bus, a real journal, and instances and a pool that a test scripts."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from triptych.actors import Actor, AddressBook, Incarnation, Topology, load_topology
from triptych.actors.runtime.bus_keys import make_bus_keys
from triptych.actors.runtime.runtime import Runtime
from triptych.bus import Outbox, Reference, RefusedError
from triptych.engines.parameters.schema import Parameter, ParameterKind, Signature
from triptych.roles.head.head import Head
from triptych.roles.messages import pool as pools
from triptych.roles.messages import requests, stages
from triptych.roles.messages.common import (
    Artifact,
    Attempt,
    LeaseRef,
    Output,
    StoredPayload,
)

BOUND_S = 10.0

PNG = Output("png")
SIGNATURE = Signature(
    (
        Parameter("height", ParameterKind.INTEGER, 512),
        Parameter("mask_image", ParameterKind.IMAGE),
        Parameter("prompt", ParameterKind.TEXT, required=True),
        Parameter("sigmas", ParameterKind.NUMBERS),
    ),
    encodes=("prompt",),
)


class Pool(Actor):
    """Answers for the pool: nothing is ever stored in it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.refuses = 0
        self.says_generation = 1
        self.silent = False
        self.asked_for_leases = asyncio.Event()
        self.held: tuple[pools.LeaseView, ...] = ()
        self.released: asyncio.Queue[tuple[LeaseRef, ...]] = asyncio.Queue()

    async def describe(self, _: pools.PoolQuery) -> pools.PoolDescription:
        if self.refuses:
            self.refuses -= 1
            raise RefusedError("not_ready", "it opens")
        return pools.PoolDescription(self.name, self.says_generation, 64, 64, 0, "", 0, "none")

    async def leases(self, _: pools.LeaseQuery) -> pools.LeaseReport:
        self.asked_for_leases.set()
        if self.silent:
            await asyncio.Event().wait()
        return pools.LeaseReport(self.held)

    async def release(self, message: pools.ReleaseBlocks) -> pools.BlocksReleased:
        self.released.put_nowait(message.leases)
        return pools.BlocksReleased(len(message.leases))


class Worker(Actor):
    """An instance's mailbox: what the head sends it waits for the test."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.attempt: asyncio.Queue[Attempt] = asyncio.Queue()
        self.cancelled: asyncio.Queue[Attempt] = asyncio.Queue()
        self.taken: set[Attempt] = set()
        self.running = asyncio.Event()
        self.running.set()

    async def assign(self, message: stages.StageAssign) -> stages.StageTaken:
        await self.running.wait()
        if message.attempt not in self.taken:  # as the real one does
            self.taken.add(message.attempt)
            self.attempt.put_nowait(message.attempt)
        return stages.StageTaken(message.attempt)

    async def push(self, message: stages.TransferPush) -> stages.StageTaken:
        self.attempt.put_nowait(message.attempt)
        return stages.StageTaken(message.attempt)

    async def cancel(self, message: stages.StageCancel) -> None:
        self.cancelled.put_nowait(message.attempt)

    async def assigned(self, message: stages.AttemptQuery) -> stages.AttemptsAssigned:
        return stages.AttemptsAssigned(tuple(attempt for attempt in message.attempts if attempt in self.taken))


@pytest.fixture
def topology(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Topology]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)
    model = tmp_path / "model"
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (model / "triptych.json").write_text(
        '{"name": "tiny", "defaults": {"height": 96}, "ranges": {"height": [64, 128, 8]}}'
    )

    def make(
        head: str = "",
        lora: str = "",
        bus: str = "",
        state: str = "state",
        supervision: str = "heartbeat_timeout_s = 1",
    ) -> Topology:
        roles = "\n".join(f'[[roles]]\nkind = "{kind}"' for kind in ("encoder", "denoiser", "decoder"))
        path = tmp_path / "t.toml"
        path.write_text(
            f'[model]\npath = "model"\n{lora}\n[state]\npath = "{state}"\n[head]\n{head}\n[bus]\n{bus}\n'
            f"[supervision]\n{supervision}\n{roles}\n"
        )
        return load_topology(path)

    return make


class HeadHarness:
    """A head under test and the other ends of its wires."""

    def __init__(self, actor: Head, head: Reference, pool: Pool, workers: dict[str, Worker]) -> None:
        self.actor, self.head, self.pool, self.workers = actor, head, pool, workers
        self.topology = actor.topology
        self.outboxes: dict[tuple[str, int], Outbox] = {}
        self.kill_pool: Callable[[], Coroutine[Any, Any, None]]
        self.start_pool: Callable[[Pool], Runtime]
        self.ended: Callable[[], Coroutine[Any, Any, str]]
        """Returns when the head stops; raises what it has crashed of."""

    async def submit(
        self, id_: str = "r", *, key: str = "", n: int = 1, output: Output = PNG, owner: str = "", **inputs: Any
    ) -> Any:
        message = requests.SubmitRequest(id_, {"prompt": "x", **inputs}, 7, n, output, key, owner)
        return await self.head.ask(message, requests.RequestAccepted, requests.RequestRejected, timeout_s=BOUND_S)

    async def view(self, id_: str = "r") -> requests.RequestView:
        return await self.head.ask(requests.QueryRequest(id_), requests.RequestView, timeout_s=BOUND_S)

    async def register(
        self, name: str, *, generation: int = 1, running: tuple[Attempt, ...] = (), signature: Signature = SIGNATURE
    ) -> stages.InstanceRegistered:
        registration = stages.RegisterInstance(
            name, name.partition("-")[0], generation, 1, 2, 2, len(running), "pool", signature, running
        )
        return await self.head.ask(registration, stages.InstanceRegistered, timeout_s=BOUND_S)

    def head_as(self, instance: str, generation: int = 1) -> Reference:
        """The head, as one incarnation of an instance reaches it."""
        sender = instance, generation
        if sender not in self.outboxes:
            self.outboxes[sender] = Outbox(*sender, options=self.actor.address_book.socket_options)
        return self.outboxes[sender].reference("head", self.head.address)

    async def report(self, message: Any, instance: str = "", generation: int = 1) -> None:
        head = self.head_as(instance or f"{message.stage}-0", generation)
        if isinstance(message, stages.StageStarted):  # which has no answer; that to what follows comes after it
            head.tell(message)
            message = stages.InstanceHeartbeat()
        await head.ask(message, stages.Acknowledged, timeout_s=BOUND_S)

    async def first_attempt(self, *, generation: int = 1) -> Attempt:
        """Submit request "r" to an encoder, as the first one, and return its attempt."""
        await self.register("encoder-0", generation=generation)
        await self.submit()
        return await self.next_attempt("encoder-0")

    async def next_attempt(self, name: str) -> Attempt:
        return await asyncio.wait_for(self.workers[name].attempt.get(), BOUND_S)


@asynccontextmanager
async def running_head(
    topology: Topology, *, generation: int = 1, pool: Pool | None = None
) -> AsyncIterator[HeadHarness]:
    address_book = AddressBook(topology)
    names = [c.name for c in topology.components if c.kind in ("encoder", "denoiser", "decoder")]
    workers = {name: Worker(name) for name in names}
    make_bus_keys(topology)
    outbox = Outbox("test", options=address_book.socket_options)
    pool = pool or Pool("pool")
    head = Head(topology)
    async with (
        Runtime([pool], Incarnation(address_book, generation)) as pools_process,
        Runtime(list(workers.values()), Incarnation(address_book, generation)),
        Runtime([head], Incarnation(address_book, generation)) as head_process,
    ):
        harness = HeadHarness(head, outbox.reference("head", address_book.address("head")), pool, workers)
        harness.kill_pool = pools_process._close
        harness.start_pool = lambda again: Runtime([again], Incarnation(address_book, generation))
        harness.ended = head_process.wait
        yield harness
        for each in (outbox, *harness.outboxes.values()):
            each.close()


def run_scenario(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 60))


def finished(attempt: Attempt) -> stages.StageFinished:
    return stages.StageFinished(attempt, "decoder", Artifact("r_0.png", "image/png", 1), 0.1, 3)


def stored(attempt: Attempt, stage: str, number: int) -> stages.StageOutputsStored:
    block = StoredPayload(LeaseRef("pool", 1, number, 0, 64), b"", 0, 64)
    return stages.StageOutputsStored(attempt, stage, block, 0.1, 3)


def fail_the_next_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have one sync of a file fail as on a broken disk."""
    fdatasync, failures = os.fdatasync, [OSError(errno.EIO, "Input/output error")]

    def failing_once(file: int) -> None:
        if failures:
            raise failures.pop()
        fdatasync(file)

    monkeypatch.setattr(os, "fdatasync", failing_once)
