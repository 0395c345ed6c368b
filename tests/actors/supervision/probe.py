"""A component without tensors, for tests of the processes around it. What it does is asked of it by message, or by
files in the state folder that are there when it starts."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import time
from pathlib import Path

from triptych.actors import Actor, Component, DeferredReply, StartError, Topology
from triptych.bus import Message, RefusedError


class Ping(Message):
    """Who is there?"""


class Pong(Message):
    pid: int
    generation: int
    restarts: int
    parent: int
    threads: str
    program: str
    """The module that was run; in a fork that of the zygote."""
    gpus: str
    """CUDA devices that it may see."""


class Crash(Message):
    text: str


class CrashInTask(Message):
    text: str


class Refuse(Message):
    detail: str


class Block(Message):
    """Run for as long as nobody sends `Release`."""


class Blocked(Message):
    pass


class Release(Message):
    pass


class Hang(Message):
    """Let work be overdue from now on."""


class LeaveOrphan(Message):
    """Start a program, and forget it."""


class OrphanLeft(Message):
    pid: int


class Multiply(Message):
    """To the component of `tests.actors.supervision.tensor_probe`."""

    size: int


class Product(Message):
    trace: float
    threads: int
    parent: int
    seed: int
    quantized_bytes: int


class Probe(Actor):
    def __init__(self, name: str, state_dir: Path) -> None:
        super().__init__(name)
        self._state_dir = state_dir
        self._released = asyncio.Event()
        self._overdue: str | None = None

    async def started(self) -> None:
        if (self._state_dir / f"{self.name}.broken").exists():
            raise StartError(f"{self.name} has no model: give it one")
        if (self._state_dir / f"{self.name}.slow").exists():
            time.sleep(2.5)  # noqa: ASYNC251  as code does that reads weights or compiles and holds the interpreter
            self.start_s["weights"] = 2.5
        if (self._state_dir / f"{self.name}.full").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if (self._state_dir / f"{self.name}.crashing").exists():
            raise RuntimeError("crashes whenever it starts")

    async def stopping(self) -> None:
        (self._state_dir / f"{self.name}.drained").write_text(str(self.generation))

    def watchdog(self) -> str | None:
        return self._overdue

    def stats(self) -> dict[str, int | float | str | bool]:
        return {"credits": 3}

    async def ping(self, message: Ping) -> Pong:
        threads = os.environ.get("OMP_NUM_THREADS", "")
        program = sys.modules["__main__"].__spec__.name  # type: ignore[union-attr]
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        return Pong(os.getpid(), self.generation, self.restarts, os.getppid(), threads, program, gpus)

    async def crash(self, message: Crash) -> Pong:
        raise ValueError(message.text)

    async def crash_in_task(self, message: CrashInTask) -> None:
        self.spawn(self._fail(message.text), name="failing")

    async def refuse(self, message: Refuse) -> Pong:
        raise RefusedError("not_today", message.detail)

    async def block(self, message: Block) -> Blocked:
        await self._released.wait()
        return Blocked()

    async def block_later(self, message: Release) -> None:
        self._released.set()

    async def hang(self, message: Hang) -> None:
        self._overdue = "step 3 takes too long"

    async def leave_orphan(self, message: LeaveOrphan) -> DeferredReply[OrphanLeft]:
        return DeferredReply(self._leave_orphan())

    async def _leave_orphan(self) -> OrphanLeft:
        script = "sleep 600 & echo $!"
        done = await asyncio.to_thread(
            subprocess.run, ["/bin/sh", "-c", script], stdout=subprocess.PIPE, check=True, stderr=subprocess.DEVNULL
        )
        return OrphanLeft(int(done.stdout))

    async def _fail(self, text: str) -> None:
        raise ValueError(text)


def build(component: Component, topology: Topology) -> list[Actor]:
    return [Probe(component.name, topology.state_dir)]
