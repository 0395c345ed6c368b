"""Which system a folder belongs to, and which supervisor runs a component: file locks that end with their process.

Several supervisors of one system share a folder (`triptych up FILE --only NAME`, each in its own terminal), so its lock
is shared. A supervisor that finds the folder unlocked locks it exclusively for a moment, and writes the record of its
owner. A supervisor that finds it locked reads that record, and goes on only if it names the same system.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from triptych.actors.errors import AlreadyRunningError, ForeignStateError
from triptych.actors.topology import ModelIdentity, paths
from triptych.actors.topology.paths import OWNER_RECORD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """The system that owns a folder: what it serves, and where it keeps its files."""

    topology: str
    """Its file, absolute."""
    state_dir: str
    """Its folder of state."""
    run_dir: str
    """Its folder of sockets."""
    pid: int
    """The supervisor that wrote this record."""
    models: tuple[ModelIdentity, ...] = ()
    """The models that it serves, except those whose folders are missing."""
    model: ModelIdentity | None = None
    """The model in a record of an earlier version, which served only one."""

    @property
    def known(self) -> tuple[ModelIdentity, ...]:
        """All models that it is known to serve."""
        return self.models or tuple(filter(None, (self.model,)))


def takeover_problem(before: Owner | None, now: Owner) -> str:
    """Return why `now` may not take over the state that `before` left, "" if it may. Pure.

    Another topology file with one of the same models may: it is a copy, or was moved. The same file with another model
    may, too: the head fails the requests that were accepted for the earlier model.
    """
    if before is None or before.topology == now.topology or not before.known or not now.known:
        return ""
    if any(model.is_same(other) for model in before.known for other in now.known):
        return ""
    paths = " and ".join(model.path for model in before.known)
    return (
        f"the state folder {now.state_dir} holds the requests and results of {before.topology}, of the model "
        f"{paths}: give {now.topology} a folder of its own with [state] path or TRIPTYCH_STATE_DIR, or "
        "move that folder away"
    )


def sharing_problem(there: Owner | None, now: Owner) -> str:
    """Return why `now` may not run beside `there`, which holds one of its folders; "" if they are one system. Pure."""
    if there is None:
        return ""
    if there.topology != now.topology:
        return (
            f"the state folder {now.state_dir} is in use by {there.topology} (process {there.pid}): give "
            f"{now.topology} a folder of its own with [state] path or TRIPTYCH_STATE_DIR, or stop that first"
        )
    if there.state_dir != now.state_dir:
        return (
            f"{now.topology} is already running here, with its state in {there.state_dir} (process {there.pid}) and "
            f"not in {now.state_dir}: set the same TRIPTYCH_STATE_DIR, or stop that first"
        )
    if there.run_dir != now.run_dir:
        return (
            f"{now.topology} is already running here, with its sockets in {there.run_dir} (process {there.pid}) and "
            f"not in {now.run_dir}: set the same XDG_RUNTIME_DIR, or stop that first"
        )
    return ""


@contextlib.contextmanager
def lock_folder(folder: Path, owner: Owner, *, keep: bool) -> Iterator[None]:
    """Hold a folder for a system, together with its other supervisors.

    The record of its owner stays in the folder if `keep`; otherwise the last supervisor to release it removes it.

    Raises:
        AlreadyRunningError: Another system holds the folder.
        ForeignStateError: The folder is free, and its contents belong to another system.
    """
    file = folder / OWNER_RECORD
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the last holder has removed the folder
            folder.mkdir(mode=0o700, exist_ok=True)
            continue
        try:
            _write_record(descriptor, owner)
            if same_file(descriptor, file):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last holder has removed it
    try:
        yield
    finally:
        if not keep and _try_exclusive_lock(descriptor):
            file.unlink(missing_ok=True)
        os.close(descriptor)


def _write_record(descriptor: int, owner: Owner) -> None:
    if _try_exclusive_lock(descriptor):
        before = _read_record(descriptor)
        if reason := takeover_problem(before, owner):
            raise ForeignStateError(reason)
        if before is not None and not owner.known:  # the API alone, on a host without the model
            owner = msgspec.structs.replace(owner, models=before.known)
        data = msgspec.json.encode(owner)
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    # The exclusive lock is only for the write. Another supervisor may have written in between: its record counts.
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if reason := sharing_problem(_read_record(descriptor), owner):
        raise AlreadyRunningError(reason)


def _try_exclusive_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read_record(descriptor: int) -> Owner | None:
    try:
        return msgspec.json.decode(os.pread(descriptor, 1 << 16, 0), type=Owner)
    except msgspec.DecodeError:  # empty, or cut off when the machine crashed
        return None


@contextlib.contextmanager
def lock_components(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Hold the components `names` of the system with this state folder; raises `AlreadyRunningError`."""
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
        os.close(descriptor)  # its holder removed it just before releasing it


def same_file(descriptor: int, file: Path) -> bool:
    """Return whether `file` is still the file that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def running_systems() -> list[Owner]:
    """Return the owners of the run folders of the systems that this user runs on this machine."""
    found = []
    for folder in paths.run_dirs():
        try:
            owner = msgspec.json.decode((folder / OWNER_RECORD).read_bytes(), type=Owner)
        except (OSError, msgspec.DecodeError):  # it ends just now, or has crashed
            continue
        if Path(f"/proc/{owner.pid}").is_dir():
            found.append(owner)
    return found
