"""Ports for those who cannot let the kernel choose."""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack


def free_ports(count: int) -> int:
    """The first of `count` ports of loopback in a row that nobody has now, nor the kernel gives to others."""
    while True:
        first = random.randrange(20_000, 32_000 - count)
        with ExitStack() as held:
            try:
                for port in range(first, first + count):
                    held.enter_context(socket.create_server(("127.0.0.1", port)))
            except OSError:
                continue
        return first
