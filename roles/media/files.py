"""Files that are written whole or not at all, and the folder that keeps those of a store."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

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


class StoreUnavailableError(OSError):
    """The place that keeps the files cannot be reached now; a later try may succeed."""


class DigestMismatchError(Exception):
    """The bytes that arrived are not those that were sent; they have been removed."""


class Files(Protocol):
    """What keeps the files of a store, by names that the store has checked. Every method blocks.

    All raise `StoreUnavailableError` when it cannot be reached now, and another `OSError` for what a later try does not
    mend, such as missing permission. `FileNotFoundError` means that there is no file of that name.
    """

    @property
    def location(self) -> str:
        """Return where the files are, for a message to an operator."""

    def prepare(self) -> None:
        """Make the place that they are kept in."""

    def path(self, name: str) -> Path | None:
        """Return where the file is or would be; None if no path of this host leads to it."""

    def write(self, name: str, data: bytes) -> None:
        """Write a file, replacing one of that name; on return it is complete, and survives a loss of power."""

    def read(self, name: str) -> bytes:
        """Read a whole file."""

    def open(self, name: str) -> BinaryIO:
        """Open a file to read parts of it, which are all of one version of it."""

    def stat(self, name: str) -> Entry:
        """Return size and age of a file."""

    def entries(self) -> list[Entry]:
        """List all files; half-written ones too, if they can be seen."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove files; one that is not there is no error."""


class LocalFiles:
    """A folder that this host can open.

    Args:
        folder: Made when the first file is written, unless it is shared.
        shared: Whether it is on a file system that several hosts mount. It is then made by `prepare` alone, so that
            nobody writes to the bare mount point while the file system is away.
    """

    def __init__(self, folder: Path, *, shared: bool = False) -> None:
        self.folder = folder
        self.shared = shared

    @property
    def location(self) -> str:
        """Return the folder."""
        return str(self.folder)

    def prepare(self) -> None:
        """Make the folder. Raises StoreUnavailableError when a shared one cannot be made."""
        try:
            self.folder.mkdir(parents=not self.shared, exist_ok=True, mode=0o700)
        except FileNotFoundError:
            raise self._away() from None

    def path(self, name: str) -> Path:
        """Return the path of a file."""
        return self.folder / name

    def write(self, name: str, data: bytes) -> None:
        """Write a file whole; see `Files.write`. Nothing is left behind when that fails."""
        if not self.shared:
            self.prepare()
        try:
            write_atomic(self.folder / name, data)
        except FileNotFoundError:
            raise self._away() from None

    def read(self, name: str) -> bytes:
        """Read a whole file."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        """Open a file; it can be read to its end even if it is replaced or removed meanwhile."""
        self._check_mounted()
        return (self.folder / name).open("rb")

    def stat(self, name: str) -> Entry:
        """Return size and age of a file."""
        self._check_mounted()
        found = (self.folder / name).stat()
        return Entry(name, found.st_mtime, found.st_size)

    def entries(self) -> list[Entry]:
        """List all files; none where there is no folder."""
        self._check_mounted()
        return list_entries(self.folder)

    def remove(self, names: Iterable[str]) -> None:
        """Remove files."""
        self._check_mounted()
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def _check_mounted(self) -> None:
        if self.shared and not self.folder.is_dir():
            raise self._away()

    def _away(self) -> StoreUnavailableError:
        return StoreUnavailableError(
            errno.ENODEV, f"{self.folder} is not there: is the file system of [store] url mounted here?"
        )


class PartialFile:
    """A file that arrives in parts. It has its name once it is whole, and until then a hidden one beside it.

    Its parts are appended. They outlive the process that wrote them, so that its successor goes on after them, or
    prunes them once they are abandoned. Every method blocks on the disk and may raise `OSError`; calls for one file
    must follow each other.

    Args:
        path: Of the whole file; in a folder that exists.
        digest: SHA-256 of the whole file, in hex.
        nbytes: Of the whole file.
    """

    def __init__(self, path: Path, digest: str, nbytes: int) -> None:
        self.path = path
        self.digest = digest
        self.nbytes = nbytes
        self._partial = path.with_name(f".{path.name}.{digest}.tmp")

    @property
    def there(self) -> int:
        """Return how many bytes are there, all of them if the whole file is."""
        try:
            return self._partial.stat().st_size
        except FileNotFoundError:  # not begun, or whole
            return self.nbytes if self._is_whole() else 0

    def append(self, offset: int, data: bytes) -> int:
        """Write the part that begins at `offset`; return `there`, from where the sender goes on.

        A part that is there already, or that does not follow on what is there, changes nothing. The last part makes the
        file whole: on return it has its name, and is on disk.

        Raises:
            DigestMismatchError: the whole file has another digest.
        """
        there = self.there
        if offset == there < self.nbytes and 0 < len(data) <= self.nbytes - there:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with os.fdopen(os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
                file.write(data)
            there += len(data)
        if there >= self.nbytes and self._partial.exists():
            self._finish()
        return there

    def _finish(self) -> None:
        with self._partial.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != self.digest:
                self._partial.unlink()
                raise DigestMismatchError(f"{self.path.name}: the {self.nbytes} bytes are not those that were sent")
            os.fsync(file.fileno())
        self._partial.replace(self.path)
        sync_folder(self.path.parent)

    def _is_whole(self) -> bool:
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size != self.nbytes:
                    return False
                return hashlib.file_digest(file, "sha256").hexdigest() == self.digest
        except FileNotFoundError:
            return False


def is_disk_full(error: OSError) -> bool:
    """Whether the disk or the user's quota is full, so that a later try may succeed."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def is_transient(error: OSError) -> bool:
    """Whether a later try may succeed, so that work should wait for it."""
    return isinstance(error, StoreUnavailableError) or is_disk_full(error)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file, replacing one of that name; on return it is complete and on disk.

    Raises:
        OSError: when the disk is full, or the folder is not there or cannot be written; nothing is left behind.
    """
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
