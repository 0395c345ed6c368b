"""Generation numbers: one for each start of each component, never the same twice."""

from __future__ import annotations

import fcntl
import time
from typing import TYPE_CHECKING

import structlog

from actors.places import private_dir

if TYPE_CHECKING:
    from pathlib import Path

_log = structlog.stdlib.get_logger("actors")


class Generations:
    """Hands out generations, and keeps the last of each component in a file of `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = private_dir(folder)

    def next(self, name: str) -> int:
        """A generation above all earlier ones of `name`, written down before it is returned."""
        with (self._folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = self._folder / name
            generation = successor(self._stored(file), time.time_ns() // 1_000_000)
            fresh = file.with_suffix(".new")
            fresh.write_text(str(generation))  # not synced: what a power failure takes away, the clock makes up for
            fresh.rename(file)
        return generation

    def _stored(self, file: Path) -> int:
        try:
            return int(file.read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            _log.warning("unreadable generation, going by the clock", file=str(file))
            return 0


def successor(stored: int, now_ms: int) -> int:
    """The generation after `stored`: the clock makes it unique without the file, the file without the clock."""
    return max(stored + 1, now_ms)
