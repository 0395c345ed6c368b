"""Which system a folder belongs to: a record in it, and a lock that ends with the processes that hold it.

Several supervisors of one system share a folder (`triptych up FILE --only NAME`, each in a terminal of its own), so
its lock is a shared one. Who finds the folder free takes it alone for a moment, and writes down whose it is from now
on; who finds it held reads that, and goes on only if it means itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import TYPE_CHECKING

import msgspec

from triptych.actors.errors import AlreadyRunningError, ForeignStateError
from triptych.actors.topology import ModelIdentity
from triptych.actors.topology.paths import OWNER_RECORD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


class Owner(msgspec.Struct, frozen=True, kw_only=True):
    """A system: what it serves, and where it keeps what it needs."""

    topology: str
    """Its file, absolute."""
    state_dir: str
    """Its folder of state."""
    run_dir: str
    """Its folder of sockets."""
    pid: int
    """The supervisor that wrote this down."""
    models: tuple[ModelIdentity, ...] = ()
    """What it serves, without those whose folders are not there."""
    model: ModelIdentity | None = None
    """The same of an earlier version, which served one."""

    @property
    def known(self) -> tuple[ModelIdentity, ...]:
        """All that it is known to serve."""
        return self.models or tuple(filter(None, (self.model,)))


def takeover_problem(before: Owner | None, now: Owner) -> str:
    """Why `now` may not take over the state that `before` has left, "" if it may. Pure.

    Another file with the same model, or with one of the same, is a copy, or the same one moved. The same file with
    another model goes on: what it had accepted for the other model is failed by the head, in words.
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
    """Why `now` may not run beside the system `there`, which holds a folder of it, "" if they are one. Pure."""
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
def hold_folder(folder: Path, owner: Owner, *, keep: bool) -> Iterator[None]:
    """Hold a folder for a system, beside other supervisors of it.

    Its record stays for the next one to find if `keep`, else the last who lets go takes it away.

    Raises:
        AlreadyRunningError: another system holds it.
        ForeignStateError: nobody holds it, but what is in it is another system's.
    """
    file = folder / OWNER_RECORD
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # the last who held the folder took it away
            folder.mkdir(mode=0o700, exist_ok=True)
            continue
        try:
            _write_record(descriptor, owner)
            if same_file(descriptor, file):
                break
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the last who held it took it away
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
        if before is not None and not owner.known:  # the api alone, without the model
            owner = msgspec.structs.replace(owner, models=before.known)
        data = msgspec.json.encode(owner)
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    # Held alone just for the moment of a write. Between the two locks another may have been first: its word counts.
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
    except msgspec.DecodeError:  # new, or a crash of the machine cut it short
        return None


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
