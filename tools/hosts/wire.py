"""A wire with a delay, run by path as `wire.py ONE OTHER SECONDS JITTER`: passes frames between two interfaces.

It says "up", and ends with its stdin. Linux has netem for this, but not every kernel.
"""

from __future__ import annotations

import random
import select
import socket
import sys
import time
from collections import deque

_EVERY_PROTOCOL = 3
_SOL_PACKET = 263
_PACKET_VNET_HDR = 15
_LONGEST = 10 + 14 + (1 << 16)


class _End:
    """One end: what has arrived there, until it leaves at the other."""

    def __init__(self, name: str) -> None:
        self.port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        # With this header, frames that the sender has neither cut nor summed up yet pass as they are.
        self.port.setsockopt(_SOL_PACKET, _PACKET_VNET_HDR, 1)
        self.port.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self.port.bind((name, _EVERY_PROTOCOL))
        self.port.setblocking(False)
        self.waiting: deque[tuple[float, bytes]] = deque()

    def take(self, delay_s: float, jitter_s: float) -> None:
        """Read the frames that have arrived; none overtakes another."""
        while True:
            try:
                frame = self.port.recv(_LONGEST)
            except BlockingIOError:
                return
            due = time.monotonic() + delay_s + jitter_s * random.uniform(-1, 1)
            self.waiting.append((max(due, self.waiting[-1][0] if self.waiting else 0.0), frame))

    def pass_on(self, other: _End) -> None:
        """Send what is due."""
        while self.waiting and self.waiting[0][0] <= time.monotonic():
            try:
                other.port.send(self.waiting.popleft()[1])
            except OSError:  # an interface that is down or full loses frames
                continue


def main() -> None:
    """Pass frames on until stdin ends."""
    ends = [_End(name) for name in sys.argv[1:3]]
    delay_s, jitter_s = map(float, sys.argv[3:5])
    print("up", flush=True)
    while True:
        due = min((end.waiting[0][0] for end in ends if end.waiting), default=None)
        patience = None if due is None else max(0.0, due - time.monotonic())
        if sys.stdin in select.select([sys.stdin, *(end.port for end in ends)], [], [], patience)[0]:
            return
        for end, other in zip(ends, reversed(ends), strict=True):
            end.take(delay_s, jitter_s)
            end.pass_on(other)


if __name__ == "__main__":
    main()
