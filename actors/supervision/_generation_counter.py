"""Generation numbers: each start of a component has a higher one than all earlier starts."""

from __future__ import annotations

import fcntl
import time
from typing import TYPE_CHECKING

import structlog

from triptych.actors.topology.paths import private_dir

if TYPE_CHECKING:
    from pathlib import Path

_log = structlog.stdlib.get_logger("actors")


class GenerationCounter:
    """Counts generations, and keeps the last one of each component in a file of `folder`.

    `clock_ahead_ms` is by how much the clock that they follow is ahead of this host's.
    """

    def __init__(self, folder: Path, clock_ahead_ms: int = 0) -> None:
        self._folder = private_dir(folder)
        self._clock_ahead_ms = clock_ahead_ms
        self._last: dict[str, int] = {}

    def next(self, name: str) -> int:
        """Return a generation above all earlier ones of `name`, after writing it to disk.

        If it cannot be written, as on a full disk, the clock alone makes it unique.
        """
        generation = next_generation(self._last.get(name, 0), time.time_ns() // 1_000_000 + self._clock_ahead_ms)
        try:
            with (self._folder / f"{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                file = self._folder / name
                generation = max(generation, self._stored(file) + 1)
                fresh = file.with_suffix(".new")
                fresh.write_text(str(generation))  # not synced: after a power failure the clock is ahead anyway
                fresh.rename(file)
        except OSError as error:
            _log.warning("generation not stored, using the clock", child=name, error=str(error))
        self._last[name] = generation
        return generation

    def _stored(self, file: Path) -> int:
        try:
            return int(file.read_text())
        except FileNotFoundError:
            return 0
        except ValueError:
            _log.warning("stored generation is unreadable, using the clock", file=str(file))
            return 0


def next_generation(stored: int, now_ms: int) -> int:
    """Return the generation after `stored`: unique even if the file is lost or the clock goes back."""
    return max(stored + 1, now_ms)
