"""The key of the bus: made once for each state folder, read by every process of the system."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from triptych.actors.errors import StartError
from triptych.actors.topology.paths import private_dir
from triptych.bus import CurveKeys

if TYPE_CHECKING:
    from triptych.actors.topology import Topology

_FILE: Final = "bus.key"


def make_bus_keys(topology: Topology) -> None:
    """Write the key that the topology's bus needs into the state folder, unless it is there; whole or not at all.

    Raises `StartError` when it cannot be written or the one that is there cannot be used, `PermissionError` as
    `private_dir` does.
    """
    if topology.bus.transport != "tcp":
        return
    file = private_dir(topology.state_dir.resolve()) / _FILE
    try:
        if not file.exists():
            _write_new(file)
    except OSError as error:
        raise StartError(f"{file} cannot be written: {error.strerror}") from error
    read_bus_keys(topology)


def read_bus_keys(topology: Topology) -> CurveKeys | None:
    """Return the key pair of the topology's bus, None where it needs none.

    Raises `StartError` when there is no key, others can read it, or it is none.
    """
    if topology.bus.transport != "tcp":
        return None
    file = topology.state_dir / _FILE
    try:
        status, text = file.stat(), file.read_text()
    except OSError as error:
        fix = "`triptych up` makes it, and every process of the system needs the same one"
        raise StartError(f"{file} cannot be read ({error.strerror}): {fix}") from error
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise StartError(f"{file} is open to other users: remove it, so that `triptych up` makes another")
    try:
        return CurveKeys.of(text.strip())
    except ValueError:
        raise StartError(f"{file} holds no key: remove it, so that `triptych up` makes another") from None


def _write_new(file: Path) -> None:
    descriptor, fresh = tempfile.mkstemp(prefix=f"{_FILE}.", dir=file.parent)  # 0600
    try:
        with os.fdopen(descriptor, "w") as written:
            written.write(CurveKeys.new().secret.decode())
        with contextlib.suppress(FileExistsError):  # another `up --only` was first: its key is the one
            os.link(fresh, file)
    finally:
        Path(fresh).unlink()
