"""Parents, children and orphans on Linux: death signals, child subreapers, and killing what a child left behind."""

from __future__ import annotations

import ctypes
import os
import signal
from pathlib import Path
from typing import Final

import structlog

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_libc = ctypes.CDLL(None, use_errno=True)
_log = structlog.stdlib.get_logger("actors")


def die_with_parent(number: signal.Signals = signal.SIGKILL) -> None:
    """Have the kernel send this process a signal when its parent ends, however it ends.

    Strictly, when the thread ends that created this process. A parent that has already ended sends nothing: compare
    `os.getppid()` afterwards.
    """
    _prctl(_PR_SET_PDEATHSIG, number)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends (a "child subreaper")."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_orphans(known: frozenset[int]) -> list[int]:
    """Kill and reap every child of this process that is not in `known`; return their pids.

    A killed process is reaped in a later call. No-op where the kernel does not list children.
    """
    orphans = [pid for pid in _children() if pid not in known]
    for pid in orphans:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        if result is None:
            _log.warning("killing a process that a child left behind", pid=pid)
            os.kill(pid, signal.SIGKILL)
    return orphans


def _children() -> list[int]:
    tasks = Path("/proc/self/task")
    files = [task / "children" for task in tasks.iterdir()]
    return [int(pid) for file in files if file.exists() for pid in file.read_text().split()]


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")
