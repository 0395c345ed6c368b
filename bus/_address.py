"""Where a mailbox is: `inproc://NAME`, `ipc:///path` or `tcp://host:port`."""

from __future__ import annotations

import re
from typing import Final, Literal

import msgspec

from triptych.bus._errors import AddressError

MAX_IPC_PATH_BYTES: Final = 107
_TCP = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9*._-]+):(?P<port>[0-9]{1,5})")


class Address(msgspec.Struct, frozen=True):
    """A parsed address."""

    scheme: Literal["inproc", "ipc", "tcp"]
    """The transport."""
    target: str
    """The inproc name, the absolute ipc path, or the tcp host (IPv6 without brackets)."""
    port: int = 0
    """The tcp port; 0 for the others."""


def parse_address(text: str) -> Address:
    """Parse and validate; raises `AddressError` with a sentence that names the address."""
    scheme, separator, rest = text.partition("://")
    if not separator or not rest:
        raise AddressError(f"{text!r} is no address: use inproc://NAME, ipc:///path or tcp://host:port")
    if scheme == "inproc":
        return Address("inproc", rest)
    if scheme == "ipc":
        return _parse_ipc(text, rest)
    if scheme == "tcp":
        return _parse_tcp(text, rest)
    raise AddressError(f"{text!r}: unknown transport {scheme!r}, use inproc, ipc or tcp")


def _parse_ipc(text: str, path: str) -> Address:
    if not path.startswith("/"):
        raise AddressError(f"{text!r}: an ipc path is absolute, as in ipc:///run/triptych/head")
    if "\0" in path or path.endswith("/"):
        raise AddressError(f"{text!r}: not the path of a file")
    size = len(path.encode())
    if size > MAX_IPC_PATH_BYTES:
        raise AddressError(f"{text!r}: the path has {size} bytes, the kernel takes {MAX_IPC_PATH_BYTES}")
    return Address("ipc", path)


def _parse_tcp(text: str, rest: str) -> Address:
    match = _TCP.fullmatch(rest)
    if match is None:
        raise AddressError(f"{text!r}: expected tcp://host:port")
    port = int(match["port"])
    if not 0 < port < 65536:
        raise AddressError(f"{text!r}: port {port} is not within 1..65535")
    return Address("tcp", match["host"].strip("[]"), port)
