"""Read weight files from the disk ahead of their loaders, and count how much has been read. Imports no torch."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

_THREADS: Final = 8
_CHUNK: Final = 64 << 20
_UNITS: Final = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def read_ahead(files: Iterable[Path], progress: ReadProgress) -> None:
    """Make the kernel read weight files into its page cache, in the background.

    Loaders map files and read them one page fault after the other, which leaves a fast disk idle most of the time. They
    cannot run in parallel, because they set torch's default dtype for the whole process.

    Args:
        files: The files of components; missing ones are skipped, since their loaders report them.
        progress: Is told how many bytes there are, and how many have been read.
    """
    there = [file for file in dict.fromkeys(files) if file.is_file()]
    if not there:
        return
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="read ahead")
    for file in there:
        size = file.stat().st_size
        progress.expect(size)
        for offset in range(0, size, _CHUNK):
            pool.submit(_advise, file, offset, min(_CHUNK, size - offset), progress)
    pool.shutdown(wait=False)


def _advise(file: Path, offset: int, nbytes: int, progress: ReadProgress) -> None:
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
    progress.ahead(nbytes)


class ReadProgress:
    """Counts the bytes of weight files that have been read. For any thread.

    The bytes read are those of the components that are loaded or those that are in the page cache, whichever is more:
    otherwise the number would not change for minutes while a large component is loaded.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = self._ahead = self._done = 0

    def expect(self, nbytes: int) -> None:
        """Add bytes to the total."""
        with self._lock:
            self._total += nbytes

    def ahead(self, nbytes: int) -> None:
        """Add bytes that have been read into the page cache."""
        with self._lock:
            self._ahead += nbytes

    def complete(self, files: Iterable[Path]) -> None:
        """Add the files of a component that is loaded."""
        nbytes = sum(file.stat().st_size for file in files)
        with self._lock:
            self._done += nbytes

    @property
    def total(self) -> int:
        """The number of bytes to read; 0 until it is known."""
        return self._total

    @property
    def read(self) -> int:
        """The number of bytes that have been read."""
        with self._lock:
            return min(max(self._ahead, self._done), self._total)

    def __str__(self) -> str:
        """Return a text such as "3.1 of 24.0 GB"; "" until the total is known."""
        if not self.total:
            return ""
        size, unit = _unit(self.total)
        return f"{self.read / size:.1f} of {self.total / size:.1f} {unit}"


def size_text(nbytes: float) -> str:
    """Format a number of bytes, such as "24.0 GB"."""
    size, unit = _unit(nbytes)
    return f"{nbytes / size:.1f} {unit}"


def _unit(nbytes: float) -> tuple[float, str]:
    return next(((size, unit) for size, unit in _UNITS if nbytes >= size), _UNITS[-1])
