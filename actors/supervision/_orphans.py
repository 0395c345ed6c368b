"""Orphans that the kernel has handed to a supervisor: what its children had started and left behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import structlog

_log = structlog.stdlib.get_logger("actors")


def kill_orphans(known: frozenset[int]) -> list[int]:
    """Kill and reap every child of this process that is not `known`; returns their pids.

    One that was killed is reaped in a later call. Does nothing where the kernel does not list children.
    """
    orphans = [pid for pid in _children() if pid not in known]
    for pid in orphans:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        if result is None:
            _log.warning("ending an orphan that a child left behind", pid=pid)
            os.kill(pid, signal.SIGKILL)
    return orphans


def _children() -> list[int]:
    tasks = Path("/proc/self/task")
    files = [task / "children" for task in tasks.iterdir()]
    return [int(pid) for file in files if file.exists() for pid in file.read_text().split()]
