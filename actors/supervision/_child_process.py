"""A running child process, watched through its pidfd: without polling, and safe from pids that are reused."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

EXIT_CRASH: Final = 70
"""Exit code of a process in which an actor crashed (EX_SOFTWARE of sysexits.h)."""
EXIT_START_DELAYED: Final = 75
"""Exit code of a process that cannot start now, for a reason that may pass (EX_TEMPFAIL of sysexits.h)."""
EXIT_START_FAILURE: Final = 78
"""Exit code of a process that can never work as configured (EX_CONFIG of sysexits.h)."""


class ExitStatus(msgspec.Struct, frozen=True):
    """How a process exited."""

    code: int | None
    """Its exit code, None if a signal killed it."""
    signal: int | None = None
    """The signal that killed it, else None."""

    def __str__(self) -> str:
        if self.signal is not None:
            return f"killed by {signal.Signals(self.signal).name}"
        return f"exit code {self.code}"


class ChildProcess:
    """A child of this process, which this class reaps: nothing else may wait for its pid.

    Raises `ProcessLookupError` when there is no such process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)
        self._loop = asyncio.get_running_loop()
        self._ending: asyncio.Future[ExitStatus] = self._loop.create_future()
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def ended(self) -> bool:
        """Whether it has exited and been reaped."""
        return self._ending.done()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; no-op after its exit."""
        if not self._ending.done():
            try:
                signal.pidfd_send_signal(self._pidfd, number)
            except ProcessLookupError:
                return  # it has just exited: `_reap` follows

    async def wait(self) -> ExitStatus:
        """Wait for its exit, and return how it exited."""
        return await asyncio.shield(self._ending)

    async def stop(self, patience_s: float) -> ExitStatus:
        """Send SIGTERM, so that it drains, and SIGKILL after `patience_s` seconds; return how it exited."""
        self.signal(signal.SIGTERM)
        try:
            return await asyncio.wait_for(self.wait(), patience_s)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            return await self.wait()

    def _reap(self) -> None:
        result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        if result is None:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        exited = result.si_code == os.CLD_EXITED
        ending = ExitStatus(result.si_status) if exited else ExitStatus(None, result.si_status)
        if not self._ending.cancelled():
            self._ending.set_result(ending)


def module_command(module: str) -> tuple[str, ...]:
    """Return the command line of a fresh interpreter that runs a module; append the module's arguments.

    With -P it imports nothing from the current folder, which others may have filled: a folder called `api` in it would
    hide ours.
    """
    return (sys.executable, "-P", "-m", module)


def spawn_process(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Start a program as a child of this process, and return its pid.

    It inherits stdout and stderr. It ignores Ctrl-C and a hang-up of the terminal: the supervisor stops it.
    """
    return os.posix_spawn(
        command[0],
        list(command),
        dict(environment),
        file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)],
        setsigdef=[signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE, signal.SIGUSR1],
        setsigmask=[signal.SIGINT, signal.SIGHUP],
    )
