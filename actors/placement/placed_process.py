"""The process of one host, kept by a program of the engine that has placed it, such as Ray's agent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from triptych.backoff import backoff_s

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

_KEPT_LINES: Final = 1000
_LONGEST_LINE: Final = 4000
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 30.0
_RAN_WELL_S: Final = 60.0


class Report(NamedTuple):
    """What a host's process has written, and whether it is over."""

    lines: list[str]
    """In order; of those that nobody fetched, the last thousand."""
    next: int
    """Number of the line after these."""
    code: int | None
    """Its last exit code, None unless it is over for good."""


class PlacedProcess:
    """Runs a command, and runs it again when it fails, with growing pauses, until it is told to stop.

    The command ends when its stdin does, which is a pipe from here: so it ends with this process, however that dies.

    Args:
        command: Its arguments.
        environment: Its variables.
        final: Exit codes after which it is not run again.

    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], final: Collection[int] = (0,)) -> None:
        self._command = tuple(command)
        self._environment = dict(environment)
        self._final = final
        self._changed = threading.Condition()  # guards what follows
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._next = 0
        self._code: int | None = None
        self._stopping = False
        self._process: subprocess.Popen[str] | None = None

    def run(self) -> None:
        """Block until it is over for good: it was stopped, or has ended with one of the final codes."""
        pauses = 0
        while True:
            began = time.monotonic()
            code = self._run_once()
            with self._changed:
                if self._stopping or code in self._final:
                    self._code = code
                    self._changed.notify_all()
                    return
                pauses = 0 if time.monotonic() - began > _RAN_WELL_S else pauses + 1
                pause_s = backoff_s(max(pauses - 1, 0), first_s=_FIRST_PAUSE_S, longest_s=_LONGEST_PAUSE_S)
                self._add(f"ended with exit code {code}, to start again in {pause_s:.1f} s")
                if self._changed.wait_for(lambda: self._stopping, pause_s):
                    self._code = code
                    self._changed.notify_all()
                    return

    def poll(self, after: int, wait_s: float) -> Report:
        """Wait for a line from number `after` on, or for the end, at most `wait_s` seconds; return what there is."""
        with self._changed:
            self._changed.wait_for(lambda: self._next > after or self._code is not None, wait_s)
            missed = self._next - len(self._lines)
            return Report(list(self._lines)[max(after - missed, 0) :], self._next, self._code)

    def say(self, line: str) -> None:
        """Add a line of this program to those of the process."""
        with self._changed:
            self._add(line)

    def fail(self, line: str) -> None:
        """Be over for good, for a reason of this program."""
        with self._changed:
            self._add(line)
            self._code = 1
            self._changed.notify_all()

    def stop(self, *, now: bool = False) -> None:
        """Close its stdin, so that it drains and ends; with `now` also ask it to kill what it has started."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
            process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):  # closed already
                process.stdin.close()
            if now:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)

    def _run_once(self) -> int:
        with self._changed:
            if self._stopping:
                return 0
            process = self._process = subprocess.Popen(  # noqa: S603  a list, of our own
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=self._environment,
                start_new_session=True,
            )
        output = process.stdout
        assert output is not None  # noqa: S101  it is a pipe
        for line in output:
            self.say(line.rstrip("\n")[:_LONGEST_LINE])
        return process.wait()

    def _add(self, line: str) -> None:
        self._lines.append(line)
        self._next += 1
        self._changed.notify_all()
