"""Read the weights files of several components from the disk at once, while they are loaded one after the other."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from triptych.engines.weights.read_progress import ReadProgress

_THREADS: Final = 8
_CHUNK: Final = 64 << 20


def read_ahead(files: Iterable[Path], progress: ReadProgress) -> None:
    """Have the kernel bring weights files into its page cache, and return while it does.

    Loaders map the files and read them a page fault after the other, which leaves a fast disk idle most of the time.
    They cannot be run side by side, because they set torch's default dtype for the whole process.

    Args:
        files: Of components; those that are not there are for their loaders to complain of.
        progress: Told how much there is, and how far this has come.
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
