"""Which system a folder belongs to: a record in it, and a lock that ends with the processes that hold it.

Several supervisors of one system share a folder (`triptych up FILE --only NAME`, each in a terminal of its own), so
its lock is a shared one. Who finds the folder free takes it alone for a moment, and writes down whose it is from now
on; who finds it held reads that, and goes on only if it means itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from typing import TYPE_CHECKING, Final

import msgspec

from triptych.actors.errors import AlreadyRunningError, ForeignStateError
from triptych.actors.supervision._locks import same_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

RECORD: Final = "owner.json"
_INDEXES: Final = frozenset({"model_index.json", "modular_model_index.json"})
_CONTENT: Final = frozenset({".json", ".safetensors", ".txt", ".model"})
_EXCLUDED_FILES: Final = frozenset({"triptych.json", RECORD})
"""The card has defaults and ranges, which have been applied to what was accepted; the record is our own."""
_SMALL: Final = 1 << 20
_SAMPLES: Final = 8
_SAMPLE_BYTES: Final = 4096


class ModelIdentity(msgspec.Struct, frozen=True):
    """What tells one model from another."""

    path: str
    """Its folder, absolute."""
    index: str
    """Digest of its index, which says of which components it is made."""
    content: str
    """Digest of its small files, and of the sizes and samples of its weights."""

    def is_same(self, other: ModelIdentity) -> bool:
        """Whether it is the same model: a copy of it, or another version in its place (docs/adr/0026)."""
        return self.content == other.content or (self.path, self.index) == (other.path, other.index)


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


def identify_model(model: Path, checkpoint: Path | None = None, others: Sequence[Path] = ()) -> ModelIdentity | None:
    """Identify a model, None where there is none; blocks on the disk.

    Args:
        model: Its folder.
        checkpoint: The file that has the weights, where it is not the folder: the model is called by it then.
        others: Files and folders of single components, in the place of the folder's own.

    Raises `OSError` for a file that cannot be read.
    """
    if not model.is_dir():
        return None
    index = hashlib.sha256()
    content = hashlib.sha256()
    for path in filter(None, (checkpoint, *others)):
        index.update(f"{path}\n".encode())
        _digest(path, [path] if path.is_file() else _content(path), content, index)
    _digest(model, _content(model), content, index)
    return ModelIdentity(str(checkpoint or model), index.hexdigest()[:32], content.hexdigest()[:32])


def _content(model: Path) -> list[Path]:
    files = (file for pattern in ("*", "*/*") for file in model.glob(pattern))
    return sorted(
        file for file in files if file.suffix in _CONTENT and file.name not in _EXCLUDED_FILES and file.is_file()
    )


def _digest(model: Path, files: Sequence[Path], content: hashlib._Hash, index: hashlib._Hash) -> None:
    for file in files:
        size = file.stat().st_size
        content.update(f"{file.relative_to(model)} {size}\n".encode())
        with file.open("rb", buffering=0) as opened:
            if size <= _SMALL:
                data = opened.read()
                content.update(data)
                if str(file.relative_to(model)) in _INDEXES:
                    index.update(data)
                continue
            for k in range(_SAMPLES):
                opened.seek((size - _SAMPLE_BYTES) * k // (_SAMPLES - 1))
                content.update(opened.read(_SAMPLE_BYTES))


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
    file = folder / RECORD
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
