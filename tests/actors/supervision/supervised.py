"""A supervisor in a process of its own, watched through its output and asked through its mailbox."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tests.actors.supervision.probe import Ping, Pong
from triptych.actors import AddressBook, load_topology
from triptych.actors.runtime.system_messages import ChildReport, SupervisorQuery, SupervisorReport
from triptych.bus import Message, Outbox

ROOT = Path(__file__).parents[3]
PATIENCE_S = 30.0
R = TypeVar("R", bound=Message)


class Supervised:
    """What the tests see of a running supervisor."""

    def __init__(self, file: Path, process: asyncio.subprocess.Process) -> None:
        self.topology = load_topology(file)
        self.process = process
        self.reports: list[ChildReport] = []
        self.lines: list[str] = []
        self._address_book = AddressBook(self.topology)
        self._news = asyncio.Condition()
        self._readers = [asyncio.create_task(self._read_reports()), asyncio.create_task(self._read_lines())]

    @cached_property
    def _outbox(self) -> Outbox:
        """Made when the supervisor has made the key of the bus."""
        return Outbox("test", options=self._address_book.socket_options)

    async def ask(self, name: str, message: Message, reply: type[R]) -> R:
        reference = self._outbox.reference(name, self._address_book.address(name))
        return await reference.ask(message, reply, timeout_s=PATIENCE_S)

    def tell(self, name: str, message: Message) -> None:
        self._outbox.reference(name, self._address_book.address(name)).tell(message)

    async def ping(self, name: str) -> Pong:
        return await self.ask(name, Ping(), Pong)

    async def report(self, supervisor: str = "supervisor") -> dict[str, ChildReport]:
        report = await self.ask(supervisor, SupervisorQuery(), SupervisorReport)
        return {child.name: child for child in report.children}

    async def until(self, name: str, state: str, *, after: int = 0) -> ChildReport:
        """The first report of a child in that state, of a generation above `after`."""

        def found() -> ChildReport | None:
            fits = (r for r in self.reports if (r.name, r.state) == (name, state) and r.generation > after)
            return next(fits, None)

        return await self._until(found)

    async def logged(self, event: str, **fields: object) -> dict[str, Any]:
        """The first line of the log with that event and those fields."""

        def found() -> dict[str, Any] | None:
            entries = (json.loads(line) for line in self.lines if line.startswith("{"))
            fits = (entry for entry in entries if entry["event"] == event and fields.items() <= entry.items())
            return next(fits, None)

        return await self._until(found)

    async def printed(self, text: str) -> str:
        """The first line on stderr that contains the text."""
        return await self._until(lambda: next((line for line in self.lines if text in line), None))

    async def all_ready(self, *names: str) -> dict[str, ChildReport]:
        names = names or tuple(component.name for component in self.topology.components)
        return {name: await self.until(name, "ready") for name in names}

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return await self.ended()

    async def ended(self) -> int:
        async with asyncio.timeout(PATIENCE_S):
            code = await self.process.wait()
            await asyncio.gather(*self._readers)
        return code

    async def close(self) -> None:
        self._outbox.close()
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    async def _until(self, find: Callable[[], R | Any]) -> Any:
        try:
            async with asyncio.timeout(PATIENCE_S), self._news:
                while (found := find()) is None:
                    await self._news.wait()
                return found
        except TimeoutError:
            seen = [f"{r.name} {r.state} {r.reason}" for r in self.reports]
            raise AssertionError(f"did not happen; seen {seen}, logged {self.lines}") from None

    async def _read_reports(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            async with self._news:
                self.reports.append(msgspec.json.decode(line, type=ChildReport))
                self._news.notify_all()

    async def _read_lines(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            async with self._news:
                self.lines.append(line.decode())
                self._news.notify_all()


@contextlib.asynccontextmanager
async def supervised(file: Path, *names: str, host: str = "", under: Sequence[str] = ()) -> AsyncIterator[Supervised]:
    """Supervise the components of a topology, or only some; at the end nothing of it is left.

    Those of one host are supervised until the end of stdin, which is a pipe. `under` is a command that runs the
    supervisor.
    """
    process = await asyncio.create_subprocess_exec(
        *under,
        *(
            sys.executable,
            "-m",
            "tests.actors.supervision.run_supervisor",
            str(file),
            *([",".join(names)] if names else [f"host={host}"] if host else []),
        ),
        cwd=ROOT,
        env={**os.environ, "TRIPTYCH_LOG_LEVEL": "info"},
        stdin=asyncio.subprocess.PIPE if host else None,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    seen = Supervised(file, process)
    try:
        yield seen
    finally:
        await seen.close()


async def gone(pid: int) -> None:
    """Return when a process, no child of this one, has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        async with asyncio.timeout(PATIENCE_S):
            await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
