"""Where a system keeps its sockets and its state on this host."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path
from typing import Final

MAX_SOCKET_PATH: Final = 107
OWNER_RECORD: Final = "owner.json"
"""File in a state or run folder that says which system it belongs to."""
_MAX_NAME_LENGTH: Final = 64  # supervisor- + a role name of 32 + an index, and what the bus appends while it binds


def run_dir(topology: Path) -> Path:
    """Return the folder of the sockets: under `$XDG_RUNTIME_DIR` if that is short enough, else /tmp/triptych-UID."""
    name = fingerprint(topology)
    for base in _run_bases():
        if len(os.fsencode(base / name)) + 1 + _MAX_NAME_LENGTH <= MAX_SOCKET_PATH:
            return base / name
    return _run_bases()[-1] / name


def run_dirs() -> list[Path]:
    """Return the run folders of this user that are there."""
    mine = [base for base in _run_bases() if base.is_dir() and base.lstat().st_uid == os.getuid()]
    return sorted(folder for base in mine for folder in base.iterdir())


def _run_bases() -> tuple[Path, ...]:
    usual = Path(f"/tmp/triptych-{os.getuid()}")  # noqa: S108  made private by private_dir
    wanted = os.environ.get("XDG_RUNTIME_DIR", "")
    return (Path(wanted).absolute() / "triptych", usual) if wanted else (usual,)


def state_dir(topology: Path, configured: str) -> Path:
    """Return the folder of the state: `$TRIPTYCH_STATE_DIR`, else as configured, else under `$XDG_STATE_HOME`."""
    override = os.environ.get("TRIPTYCH_STATE_DIR", "")
    if override:
        return Path(override).absolute()
    if configured:
        return (topology.parent / Path(configured).expanduser()).resolve()
    home = os.environ.get("XDG_STATE_HOME", "")
    base = Path(home).absolute() if home else Path.home() / ".local" / "state"
    return base / "triptych" / f"{topology.stem}-{fingerprint(topology)}"


def fingerprint(topology: Path) -> str:
    """Return twelve hex digits that stand for the absolute path of a topology."""
    return hashlib.sha256(os.fsencode(topology)).hexdigest()[:12]


def private_run_dir(folder: Path) -> Path:
    """Make a run folder, with a private parent: in /tmp others could otherwise replace it."""
    private_dir(folder.parent)
    return private_dir(folder)


def private_state_dir(folder: Path) -> Path:
    """Make a state folder, and make files private that an earlier version left readable.

    Raises `PermissionError` for a folder of another user or of all users, `OSError` if it cannot be made.
    """
    own = "give the state a folder of its own with [state] path or TRIPTYCH_STATE_DIR"
    if folder.is_dir() and folder.stat().st_mode & stat.S_ISVTX:  # such as /tmp: all others would lose access
        raise PermissionError(f"{folder} is a folder for all users: {own}")
    private_dir(folder.resolve(), own)
    for pattern in ("journal.sqlite*", "generations/*"):
        for file in folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # a running component may remove it
                if file.stat().st_mode & 0o077:
                    file.chmod(0o600)
    return folder


def private_dir(folder: Path, fix: str = "remove it or set XDG_RUNTIME_DIR") -> Path:
    """Make a folder that only this user can enter; raises `PermissionError`, with `fix`, if another user owns it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} does not belong to user {os.getuid()}: {fix}")
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)
    return folder
