"""Carries messages between two actors of one event loop without sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq


class LocalLink:
    """The way from an outbox to a mailbox of the same event loop, and back for the answers.

    It stands in for the sockets and raises what they raise. Frames arrive in the order in which they were sent, in a
    later turn of the loop, so that neither side runs within a call of the other.

    Args:
        receive: Takes a frame for the mailbox, with this link as its route.
        on_answer: Takes an answer for the outbox, as a list of one frame.
        on_lost: Called once the mailbox has closed, after its last answers.
        room: Most frames that are on their way to the mailbox.
    """

    def __init__(
        self,
        receive: Callable[[LocalLink, list[bytes]], None],
        on_answer: Callable[[list[bytes]], None],
        on_lost: Callable[[], None],
        room: int,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._receive = receive
        self._on_answer = on_answer
        self._on_lost = on_lost
        self._room = room
        self._under_way = 0
        self._closed = False

    def send(self, frame: bytes) -> None:
        """Send a frame to the mailbox; raises `zmq.Again` when there is no room."""
        if self._under_way >= self._room:
            raise zmq.Again
        self._under_way += 1
        self._loop.call_soon(self._arrive, frame)

    def answer(self, frame: bytes) -> None:
        """Send a frame to the outbox; raises `zmq.ZMQError` EHOSTUNREACH when that has closed the link."""
        if self._closed:
            raise zmq.ZMQError(zmq.EHOSTUNREACH)
        self._loop.call_soon(self._answered, frame)

    def lose(self) -> None:
        """Tell the outbox that the mailbox has closed."""
        self._loop.call_soon(self._on_lost)

    def drain(self) -> None:
        """No-op: answers arrive before the loss."""

    def close(self) -> None:
        """Close from the outbox's side; what has been sent still arrives, answers do not."""
        self._closed = True

    def _arrive(self, frame: bytes) -> None:
        self._under_way -= 1
        self._receive(self, [frame])

    def _answered(self, frame: bytes) -> None:
        if not self._closed:
            self._on_answer([frame])
