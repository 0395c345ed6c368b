"""Retention of files: bounds by age, number and bytes."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from triptych.roles.media.files import Entry


@dataclass(frozen=True, slots=True)
class StoreBounds:
    """Bounds of a store. Files beyond one of them are removed, the oldest first."""

    max_age_s: float
    max_count: int
    max_bytes: int


NO_BOUNDS: Final = StoreBounds(math.inf, sys.maxsize, sys.maxsize)


def surplus(entries: Iterable[Entry], bounds: StoreBounds, *, now: float, needed: Callable[[Entry], bool]) -> list[str]:
    """Choose what to remove: what is too old, and of the rest the oldest that do not fit beside newer ones.

    Args:
        entries: The files of a store.
        bounds: Of that store.
        now: Unix seconds.
        needed: Whether a file has to stay, whatever the bounds say; it counts all the same.

    Returns:
        Names, sorted.
    """
    gone, count, nbytes = [], 0, 0
    for entry in sorted(entries, key=lambda e: (needed(e), e.modified_at, e.name), reverse=True):
        fits = count < bounds.max_count and nbytes + entry.nbytes <= bounds.max_bytes
        if needed(entry) or (fits and now - entry.modified_at <= bounds.max_age_s):
            count, nbytes = count + 1, nbytes + entry.nbytes
        else:
            gone.append(entry.name)
    return sorted(gone)
