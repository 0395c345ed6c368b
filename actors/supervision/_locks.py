"""One supervisor for each component on a host: held by a file lock, so that it ends with its process."""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

from triptych.actors.errors import AlreadyRunningError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@contextlib.contextmanager
def hold_components(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Hold the components `names` of the system whose state folder `folder` is; raises `AlreadyRunningError`."""
    with contextlib.ExitStack() as held:
        for name in names:
            held.enter_context(_exclusive(folder / f"{name}.lock", name))
        yield


@contextlib.contextmanager
def _exclusive(file: Path, name: str) -> Iterator[None]:
    descriptor = _lock(file, name)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(file: Path, name: str) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(descriptor, 32).decode() or "?"
            os.close(descriptor)
            raise AlreadyRunningError(f"{name} is already running here, under process {pid}: stop that first") from None
        if same_file(descriptor, file):
            return descriptor
        os.close(descriptor)  # its holder removed it just before letting go


def same_file(descriptor: int, file: Path) -> bool:
    """Whether `file` is still what was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False
