"""Binds a socket to its address, and for ipc owns the socket file."""

from __future__ import annotations

import contextlib
import os
import socket as unix
import stat
from pathlib import Path
from typing import Final

import zmq

from triptych.bus._address import Address
from triptych.bus._errors import AddressError

_BACKLOG: Final = 128


class Binding:
    """A bound address; `release` frees an ipc or inproc address at once, not when ZMQ's thread closes the socket."""

    def __init__(self, socket: zmq.Socket[bytes], address: Address, text: str) -> None:
        """Bind; raises `AddressError` when a live process serves the address or it cannot be bound."""
        self._socket = socket
        self._inproc = text if address.scheme == "inproc" else None
        self._path: Path | None = None
        self._inode = 0
        if address.scheme == "ipc":
            # ZMQ would unlink whatever is there, even the file of a live mailbox, and once more some time after the
            # close, when it may be the file of a successor. So this class makes the listener and its file.
            self._path = Path(address.target)
            descriptor = _listen(self._path)
            self._inode = self._path.stat().st_ino
            socket.setsockopt(zmq.USE_FD, descriptor)
        try:
            socket.bind(text)
        except zmq.ZMQError as error:
            raise AddressError(f"{text} cannot be bound: {error.strerror}") from error

    def release(self) -> None:
        """Release the address; an ipc file that a successor has put in its place stays. Once only."""
        if self._inproc is not None:
            self._socket.unbind(self._inproc)
        if self._path is not None:
            # The run folder may have been removed already, and the file with it.
            with contextlib.suppress(FileNotFoundError):
                if self._path.stat().st_ino == self._inode:
                    self._path.unlink()


def _listen(path: Path) -> int:
    _make_private_folder(path.parent)
    remove_if_stale(path)
    listener = unix.socket(unix.AF_UNIX, unix.SOCK_STREAM | unix.SOCK_NONBLOCK)
    try:
        listener.bind(str(path))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise AddressError(f"ipc://{path} cannot be bound: {error.strerror}") from error
    return listener.detach()


def _make_private_folder(folder: Path) -> None:
    """Make a folder for this user alone, or check that an existing one is: whoever can enter it can send messages."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise AddressError(f"the folder {folder} cannot be made: {error.strerror}") from error
    status = folder.stat()
    if status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise AddressError(f"the folder {folder} is open to other users: make it yours alone (chmod 700)")


def remove_if_stale(path: Path) -> None:
    """Remove a socket that a killed process left behind; raises `AddressError` if it is served, or no socket."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise AddressError(f"{path} is there already and is no socket")
    except FileNotFoundError:
        return
    with unix.socket(unix.AF_UNIX, unix.SOCK_STREAM | unix.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)  # a killed process left it behind
            return
        except OSError as error:
            raise AddressError(f"ipc://{path} cannot be probed: {error.strerror}") from error
    raise AddressError(f"ipc://{path} is served by a live process")
