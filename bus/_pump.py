"""Drives one ZMQ socket from an asyncio loop through its file descriptor.

The descriptor of a ZMQ socket is edge triggered: it signals a change once. So every wake-up
reads until EAGAIN, and because a send may consume the edge of a message that arrived meanwhile, every send
is followed by a check of EVENTS. `zmq.asyncio` does the same at about three times the price.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import zmq

_NOBLOCK: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.SNDMORE | zmq.NOBLOCK)
_EVENTS: Final = int(zmq.EVENTS)  # plain numbers: pyzmq looks an enum up on every call
_POLLIN: Final = int(zmq.POLLIN)
_RCVMORE: Final = int(zmq.RCVMORE)
_MAX_FRAMES: Final = 16  # kept of one message; a valid one has fewer
_MAX_MESSAGES_PER_TURN: Final = 256  # so that a flood cannot starve the loop


class Pump:
    """Hands every message that arrives on `socket` to `on_message`, as a list of its first `_MAX_FRAMES` frames.

    Works on the running loop, stdlib or uvloop. Without traffic it uses no CPU.
    """

    def __init__(self, socket: zmq.Socket[bytes], on_message: Callable[[list[bytes]], None]) -> None:
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self._socket = socket
        self._on_message = on_message
        self._descriptor = int(socket.getsockopt(zmq.FD))
        self._scheduled = False
        self.loop.add_reader(self._descriptor, self._on_readable)
        self._schedule()  # the edge of what came before the reader was added is gone

    def send(self, *frames: bytes) -> None:
        """Queue one message, whole or not at all. Raises `zmq.Again` (full), `zmq.ZMQError` EHOSTUNREACH."""
        send = self._socket.send
        for frame in frames[:-1]:
            send(frame, _MORE)
        send(frames[-1], _NOBLOCK)
        if not self._scheduled and int(self._socket.getsockopt(_EVENTS)) & _POLLIN:
            self._schedule()

    def drain(self) -> None:
        """Read everything that has arrived by now."""
        while not self._read():
            pass

    def close(self, linger_ms: int = 0) -> None:
        """Stop reading and close the socket; returns at once.

        ZMQ's own thread has `linger_ms` to send what is queued; the rest is dropped.
        """
        if not self.closed:
            self.closed = True
            self.loop.remove_reader(self._descriptor)
            self._socket.close(linger=linger_ms)

    def _schedule(self) -> None:
        self._scheduled = True
        self.loop.call_soon(self._on_readable)

    def _on_readable(self) -> None:
        self._scheduled = False
        drained = False
        try:
            drained = self._read()
        finally:
            # Also when `on_message` raised: the edge is gone, and more messages may wait.
            if not drained:
                self._schedule()

    def _read(self) -> bool:
        """Read up to `_MAX_MESSAGES_PER_TURN` messages; True when there were no more."""
        for _ in range(_MAX_MESSAGES_PER_TURN):
            frames = None if self.closed else self._receive()
            if frames is None:
                return True
            self._on_message(frames)
        return False

    def _receive(self) -> list[bytes] | None:
        receive = self._socket.recv
        try:
            frames = [receive(_NOBLOCK)]
        except zmq.Again:
            return None
        while self._socket.getsockopt(_RCVMORE):
            frame = receive(_NOBLOCK)
            if len(frames) < _MAX_FRAMES:
                frames.append(frame)
        return frames
