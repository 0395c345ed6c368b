"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path

ABANDONED_S = 3600.0
"""A half-written file as old as this was left by a process that has died."""

_TEMPORARY = re.compile(r"\..*\.tmp")
_serial = itertools.count()


@dataclass(frozen=True, slots=True)
class Entry:
    """A file of a folder."""

    name: str
    modified_at: float
    """Unix seconds."""
    nbytes: int = 0

    def abandoned(self, now: float) -> bool:
        """Whether it is half-written and its writer has died."""
        return bool(_TEMPORARY.fullmatch(self.name)) and now - self.modified_at > ABANDONED_S


def is_disk_full(error: OSError) -> bool:
    """Whether the disk or the user's quota is full, so that a later try may succeed."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file, replacing one of that name; on return it is complete and on disk.

    Its folder is made where there is none.

    Raises:
        OSError: when the disk is full or the folder cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_serial)}.tmp")
    try:
        _write_through(temporary, data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def list_entries(folder: Path) -> list[Entry]:
    """List the files of a folder; none where there is no folder."""
    if not folder.is_dir():
        return []
    found = (_entry(path) for path in folder.iterdir())
    return [entry for entry in found if entry is not None]


def _write_through(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk (fsync)."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry(path: Path) -> Entry | None:
    try:
        stat = path.stat()
    except FileNotFoundError:  # another process pruned it first
        return None
    return Entry(path.name, stat.st_mtime, stat.st_size)
