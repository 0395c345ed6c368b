"""How much of the weights of a process has been read. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_UNITS: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


class ReadProgress:
    """Bytes of weight files that have been read of those that will be; for any thread.

    What has been read is what the components that are complete have, or what was brought into the page cache ahead of
    them, whichever is more: a component of many gigabytes would stand still for minutes otherwise.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = self._ahead = self._done = 0

    def expect(self, nbytes: int) -> None:
        """So many more bytes will be read."""
        with self._lock:
            self._total += nbytes

    def ahead(self, nbytes: int) -> None:
        """So many bytes have come into the page cache."""
        with self._lock:
            self._ahead += nbytes

    def complete(self, files: Iterable[Path]) -> None:
        """A component has been made of these files."""
        nbytes = sum(file.stat().st_size for file in files)
        with self._lock:
            self._done += nbytes

    @property
    def total(self) -> int:
        """Bytes that will have been read; 0 until that is known."""
        return self._total

    @property
    def read(self) -> int:
        """Bytes that have been read."""
        with self._lock:
            return min(max(self._ahead, self._done), self._total)

    def __str__(self) -> str:
        """Such as "3.1 of 24.0 GB", "" until it is known how much there is."""
        if not self.total:
            return ""
        size, unit = _unit(self.total)
        return f"{self.read / size:.1f} of {self.total / size:.1f} {unit}"


def size_text(nbytes: float) -> str:
    """Write a size in bytes for people, such as "24.0 GB"."""
    size, unit = _unit(nbytes)
    return f"{nbytes / size:.1f} {unit}"


def _unit(nbytes: float) -> tuple[float, str]:
    return next(((size, unit) for size, unit in _UNITS if nbytes >= size), _UNITS[-1])
