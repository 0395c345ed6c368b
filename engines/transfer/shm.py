"""The backend for one host: it pulls by a copy out of the other pool's mapped arena."""

from __future__ import annotations

import threading
import time

from triptych.engines.codec.checksum import Bytes
from triptych.engines.memory.arena import Arena, ArenaAddress, ArenaError
from triptych.engines.memory.leases import ByteRange
from triptych.engines.transfer.backend import TransferError

PIECE = 16 << 20
"""Bytes that are copied between two looks at the clock: a pull exceeds its timeout by the copy of one at most."""


def open_shm(
    arena: Arena, *, hostname: str, protocol: str, ib_device: str, ports: tuple[int, int] | None = None
) -> ShmBackend:
    """Open the backend; it needs none of the network's settings."""
    return ShmBackend(arena)


class ShmBackend:
    """Pulls by copying shared memory. Its session is the address of the arena, and so of one incarnation of a pool."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._peers: dict[str, Arena] = {}
        self._lock = threading.Lock()
        self._closed = False

    @property
    def session(self) -> str:
        """The address of the arena."""
        return str(self._arena.address)

    @property
    def base(self) -> int:
        """0: peers address bytes by their offset."""
        return 0

    def describe(self) -> str:
        """Describe the transport."""
        return "shared memory of this host"

    def exposed(self) -> str:
        """Return "": the memory is shared by file descriptor, with processes of one user."""
        return ""

    def pull(self, session: str, address: int, offset: int, nbytes: int, timeout_s: float) -> None:
        """Copy from the arena `session`; see `TransferBackend.pull`. Writes nothing after it has returned or raised."""
        deadline = time.monotonic() + timeout_s
        target = _checked(self._arena, offset, nbytes)
        peer = self._peer(session)
        try:
            source = peer.array(address, nbytes)
        except ArenaError as error:
            raise TransferError(f"the source cannot be read: {error}", retryable=False) from error
        for start in range(0, nbytes, PIECE):
            if time.monotonic() >= deadline:
                raise TransferError(f"copying {nbytes} bytes took longer than {timeout_s:g} s", retryable=True)
            target[start : start + PIECE] = source[start : start + PIECE]

    def late(self) -> tuple[ByteRange, ...]:
        """Return (): a copy ends before its pull does."""
        return ()

    def close(self) -> None:
        """Unmap the arenas of the peers."""
        with self._lock:
            self._closed = True
            for peer in self._peers.values():
                peer.close()
            self._peers.clear()

    def _peer(self, session: str) -> Arena:
        with self._lock:
            if self._closed:
                raise TransferError("the backend is closed", retryable=False)
            self._forget_stale()
            peer = self._peers.get(session)
            if peer is None:
                peer = self._peers[session] = _attach(session)
            return peer

    def _forget_stale(self) -> None:
        # The arena of a dead pool can still be read, but its leases are gone.
        for session in [session for session, peer in self._peers.items() if peer.stale]:
            self._peers.pop(session).close()


def _attach(session: str) -> Arena:
    try:
        return Arena.attach(ArenaAddress.parse(session))
    except ArenaError as error:
        raise TransferError(f"the pool that holds the bytes is gone: {error}", retryable=False) from error


def _checked(arena: Arena, offset: int, nbytes: int) -> Bytes:
    try:
        return arena.array(offset, nbytes)
    except ArenaError as error:
        raise ValueError(str(error)) from error
