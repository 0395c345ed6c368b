"""Real actors on one loop, and the other end of their wire: a head that a test scripts."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest
import structlog
import uvloop

from triptych.actors import Actor, AddressBook, Incarnation, Topology, load_topology
from triptych.actors.runtime.runtime import Runtime
from triptych.bus import Message, RefusedError
from triptych.roles.messages import stages
from triptych.roles.messages.common import Attempt

T = TypeVar("T")
R = TypeVar("R", bound=Message)
LIMIT_S = 60
ROOT = Path(__file__).parents[2]

Report = (
    stages.TransferFailed
    | stages.StageStarted
    | stages.StageOutputsStored
    | stages.StageFinished
    | stages.StageFailed
    | stages.StageReturned
    | stages.StageCancelled
    | stages.InstanceStopping
    | stages.InstanceWakeChanged
)


class Inbox:
    """What arrived, by type; a test waits for the next of a type."""

    def __init__(self) -> None:
        self.all: list[Message] = []
        self._unread: list[Message] = []
        self._news = asyncio.Condition()

    async def put(self, message: Message) -> None:
        async with self._news:
            self.all.append(message)
            self._unread.append(message)
            self._news.notify_all()

    async def next(self, kind: type[R]) -> R:
        """The oldest unread message of that type, which is then read."""
        async with self._news:
            await self._news.wait_for(lambda: any(isinstance(m, kind) for m in self._unread))
            found = next(m for m in self._unread if isinstance(m, kind))
            self._unread.remove(found)
            return found

    def of(self, kind: type[R]) -> list[R]:
        return [m for m in self.all if isinstance(m, kind)]


class ScriptedHead(Actor):
    """Says what a head says, keeps what it is told; a test decides what it sends."""

    def __init__(self) -> None:
        super().__init__("head")
        self.inbox = Inbox()
        self.unknown: set[Attempt] = set()
        self.fenced = False
        self.forgets = False
        self.refuses_hello = ""
        self.silent_on: type[Message] | None = None

    async def hello(self, message: stages.Hello) -> stages.Acknowledged:
        self._check()
        await self.inbox.put(message)
        if self.refuses_hello:
            raise RefusedError("other_release", self.refuses_hello)
        return stages.Acknowledged()

    async def register(self, message: stages.RegisterInstance) -> stages.InstanceRegistered:
        self._check()
        await self.inbox.put(message)
        return stages.InstanceRegistered(tuple(w for w in message.running if w in self.unknown))

    async def heartbeat(self, message: stages.InstanceHeartbeat) -> stages.Acknowledged:
        self._check()
        if self.forgets:
            raise RefusedError("unknown", "forgotten by the test")
        await self.inbox.put(message)
        return stages.Acknowledged()

    async def report(self, message: Report) -> stages.Acknowledged:
        self._check()
        await self.inbox.put(message)
        if self.silent_on and isinstance(message, self.silent_on):
            await asyncio.Event().wait()
        return stages.Acknowledged()

    async def progress(self, message: stages.StageProgress | stages.BlocksOffered) -> None:
        await self.inbox.put(message)

    def _check(self) -> None:
        if self.fenced:
            raise RefusedError("fenced", "given up by the test")


class LocalCluster:
    """The components of a topology as actors of this process; each can be started, stopped and killed."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.address_book = AddressBook(topology, {"test": f"ipc://{topology.run_dir}/test"})
        self.runtimes: dict[str, Runtime] = {}
        self.actors: dict[str, Actor] = {}
        self.processes: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, *actors: Actor, generation: int = 1, kind: str = "") -> Runtime:
        runtime = Runtime(actors, Incarnation(self.address_book, generation, kind=kind), shutdown_s=5.0)
        await runtime.__aenter__()
        self.runtimes[actors[0].name] = runtime
        self.actors.update({actor.name: actor for actor in actors})
        return runtime

    async def component(self, name: str, build: Any, generation: int = 1) -> Runtime:
        component = self.topology.component(name)
        return await self.start(*build(component, self.topology), generation=generation, kind=component.kind)

    async def kill(self, name: str) -> None:
        """End without a drain, as a killed process does: its sockets close and its tasks are gone."""
        await self.runtimes.pop(name)._close()

    async def stop(self, name: str) -> None:
        """Drain."""
        await self.runtimes.pop(name).__aexit__(None, None, None)

    async def process(self, name: str, generation: int = 1) -> asyncio.subprocess.Process:
        """Start a component in a process of its own, as its supervisor does; it is killed with the cluster."""
        arguments = ("--topology", str(self.topology.path), "--name", name, "--generation", str(generation))
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "triptych.actors.supervision.component_process",
            *arguments,
            "--parent",
            str(os.getpid()),
            cwd=ROOT,
        )
        self.processes[name] = process
        return process

    async def end(self, name: str) -> None:
        """SIGKILL a process and wait for its end."""
        process = self.processes.pop(name)
        if process.returncode is None:
            process.kill()
        await process.wait()

    async def close(self) -> None:
        for name in list(self.processes):
            await self.end(name)
        for name in reversed(list(self.runtimes)):
            await self.kill(name)


@pytest.fixture(scope="session", autouse=True)
def plain_tracebacks() -> None:
    """A traceback with every local value takes seconds to draw."""
    renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[structlog.contextvars.merge_contextvars, structlog.stdlib.add_log_level, renderer])


TOML = """
[model]
path = "{model}"
dtype = "float32"
[transfer]
engine = "{engine}"
trusted_network = true
pool_size = "{pool_size}"
[state]
path = "state"
[supervision]
heartbeat_timeout_s = 4
{roles}
"""


@pytest.fixture
def run() -> Iterator[Callable[[Coroutine[Any, Any, T]], T]]:
    """Run a coroutine on uvloop; more than `LIMIT_S` seconds is a failure."""

    async def bounded(coroutine: Coroutine[Any, Any, T]) -> T:
        async with asyncio.timeout(LIMIT_S):
            return await coroutine

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield lambda coroutine: runner.run(bounded(coroutine))


@pytest.fixture(scope="session")
def tiny_model(models: Callable[[str], Path]) -> Path:
    """A Flux model of random weights that makes 64 x 64 images. Not to be changed by a test."""
    return models("flux")


MakeTopology = Callable[..., Topology]


@pytest.fixture
def make_topology(tmp_path: Path) -> Iterator[MakeTopology]:
    """Make a topology with two instances of each kind, or of the one named."""
    made: list[Topology] = []

    def make(
        model: Path | str = "none",
        *,
        kind: str = "",
        engine: str = "shm",
        pool_size: str = "4MiB",
        slots: int = 2,
        backend: str = "",
        cache: str = "",
    ) -> Topology:
        kinds = [kind] if kind else ["encoder", "denoiser", "decoder"]
        roles = "\n".join(f'[[roles]]\nkind = "{kind}"\nslots = {slots}\ncount = 2' for kind in kinds)
        roles = roles.replace('"denoiser"', f'"denoiser"\ncache = "{cache}"')
        file = tmp_path / "cluster.toml"
        file.write_text(TOML.format(model=model, engine=engine, pool_size=pool_size, roles=roles))
        topology = load_topology(file)
        if backend:  # the pools of one engine with the transport of another
            topology = msgspec.structs.replace(
                topology, transfer=msgspec.structs.replace(topology.transfer, engine=backend)
            )
        made.append(topology)
        return topology

    yield make
    for topology in made:
        shutil.rmtree(topology.run_dir, ignore_errors=True)


@pytest.fixture
def local_cluster() -> Callable[[Topology], Any]:
    """`async with local_cluster(topology) as h:` closes everything that was started in it."""

    @asynccontextmanager
    async def open_cluster(topology: Topology) -> AsyncIterator[LocalCluster]:
        local_cluster = LocalCluster(topology)
        try:
            yield local_cluster
        finally:
            await local_cluster.close()

    return open_cluster


@pytest.fixture
def scripted_head() -> type[ScriptedHead]:
    return ScriptedHead


@pytest.fixture
def inbox() -> type[Inbox]:
    return Inbox


@pytest.fixture
def cluster(run: Any, make_topology: Any, local_cluster: Any, scripted_head: Any, tiny_model: Path) -> Any:
    """Run a test with a head and a pool; the test starts the instances."""

    from tests.roles.cluster_harness import ClusterDriver
    from triptych.roles.pool import pool

    def start(body: Any, **options: Any) -> None:
        async def all_of_it() -> None:
            async with local_cluster(make_topology(tiny_model, **options)) as h:
                for component in h.topology.components:
                    if component.kind == "pool":
                        await h.component(component.name, pool.build)
                await h.start(head := scripted_head())
                await body(ClusterDriver(h, head))

        run(all_of_it())

    return start


@pytest.fixture
def denoise_gate(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Holds every denoise after its first step, of which it tells, until it is opened."""
    from triptych.engines.steps.denoising import Denoising
    from triptych.roles.worker import stream_worker

    monkeypatch.setattr(stream_worker, "SHORT_STEPS_S", 0.0)  # else it would take the second step before it tells

    opened, proceed = threading.Event(), Denoising.proceed

    def held(self: Any) -> Any:
        if self.step == 1:
            assert opened.wait(30)
        return proceed(self)

    monkeypatch.setattr(Denoising, "proceed", held)
    yield opened
    opened.set()


@pytest.fixture
def run_transfers(run: Any, make_topology: Any, local_cluster: Any, inbox: Any) -> Any:
    """Run a test with a pool, and transfer actors by name on demand: `open_transfer("encoder-0")`."""

    from tests.roles.transfer_harness import TransferHarness
    from triptych.roles.pool.pool import build

    def start(body: Any, pools: tuple[str, ...] = ("pool",), **options: Any) -> None:
        async def all_of_it() -> None:
            async with local_cluster(make_topology(**options)) as h:
                for pool in pools:
                    await h.component(pool, build, generation=3)

                async def open_transfer(name: str, **elsewhere: Any) -> Any:
                    return await TransferHarness(h, name, inbox, **elsewhere).start()

                await body(h, open_transfer)

        run(all_of_it())

    return start
