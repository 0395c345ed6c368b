"""Ports that parallel test processes do not take from each other, for those who cannot let the kernel choose."""

from __future__ import annotations

import fcntl
import functools
import os
import socket
import tempfile
from contextlib import ExitStack
from pathlib import Path

_FIRST, _LAST = 20_000, 32_000
"""Below the ports that the kernel gives to others."""
_COUNT = 250
_lock: int
"""Descriptor that holds the range of this process as long as it lives."""


@functools.cache
def port_range() -> range:
    """Return the ports of this process: no other process that calls this on the host has one of them."""
    global _lock
    for first in range(_FIRST, _LAST, _COUNT):
        path = Path(tempfile.gettempdir()) / f"triptych-test-ports-{os.getuid()}-{first}"
        _lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(_lock)
        else:
            return range(first, first + _COUNT)
    raise RuntimeError("more than 48 test processes run on this host")


def mooncake_environment() -> dict[str, str]:
    """Return the settings that let engines of mooncake choose their ports in the first half of the range."""
    ports = port_range()
    return {"MC_MIN_RPC_PORT": str(ports[0]), "MC_MAX_RPC_PORT": str(ports[_COUNT // 2 - 1])}


_next = 0


def free_ports(count: int) -> int:
    """Return the first of `count` ports of loopback in a row that nobody has, from the second half of the range."""
    global _next
    half = port_range()[_COUNT // 2 :]
    for _ in half:
        _next = _next if _next + count <= len(half) else 0
        first, _next = half[_next], _next + count
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.create_server(("", port)))
            except OSError:
                continue
        return first
    raise RuntimeError(f"no {count} free ports from {half[0]} to {half[-1]}")
