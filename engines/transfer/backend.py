"""The interface of the transfer backends."""

from __future__ import annotations

from typing import Protocol

ByteRange = tuple[int, int]  # offset in the local arena, nbytes


class TransferBackend(Protocol):
    """Pulls bytes from the arena of another pool into the arena it was opened for.

    A peer is addressed by its `session`, and its bytes by `base + offset`: both are announced with its
    leases.
    """

    @property
    def session(self) -> str:
        """How peers address this backend; never the same for two incarnations of a pool where that can be had."""

    @property
    def base(self) -> int:
        """What peers add to an offset in this arena to address it."""

    def describe(self) -> str:
        """Say what transport really runs, in one line for the log and for operators."""

    def exposed(self) -> str:
        """Say what of this process others can reach without being asked who they are; "" for nothing."""

    def pull(self, session: str, address: int, offset: int, nbytes: int, timeout_s: float) -> None:
        """Copy `nbytes` bytes at `address` of the peer to `offset` in the local arena.

        Blocks the calling thread. Pulls from different peers may run on different threads. Raises TransferError, and
        ValueError for a local range outside the arena.
        """

    def late(self) -> tuple[ByteRange, ...]:
        """List the local ranges that a pull which has failed may still write to."""

    def close(self) -> None:
        """Stop serving and pulling; may block for a second. The arena must live until this returns."""
