"""The interface of the transfer backends, and the errors that they raise."""

from __future__ import annotations

from typing import Protocol

from triptych.engines.memory.leases import ByteRange


class TransferError(Exception):
    """A pull has failed.

    Attributes:
        reason: A sentence for the log and for the head.
        retryable: Whether the same pull can succeed later.
        quarantine: Whether something may still write to the local block, which must not be leased until that ends.
    """

    def __init__(self, reason: str, *, retryable: bool, quarantine: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retryable = retryable
        self.quarantine = quarantine


class TransferSetupError(Exception):
    """A backend cannot work here; the message says what to install or to set."""


class TransferBackend(Protocol):
    """Pulls bytes from the arena of another pool into the arena that it was opened for.

    A peer is addressed by its `session`, and a byte of its arena by `base + offset`; its leases carry both. What
    is said here is tested of every backend by `tests/engines/transfer/test_every_backend.py`.
    """

    @property
    def session(self) -> str:
        """The address of this backend for its peers; if possible, different for each incarnation of a pool."""

    @property
    def base(self) -> int:
        """The number that peers add to an offset in this arena to address it."""

    def describe(self) -> str:
        """Describe the transport that is really used, in one line for the log and for operators."""

    def exposed(self) -> str:
        """Describe what others can access in this process without authentication; "" for nothing."""

    def pull(self, session: str, address: int, offset: int, nbytes: int, timeout_s: float) -> None:
        """Copy bytes of a peer into the local arena.

        Blocks the calling thread. Pulls from different peers may run on different threads.

        Args:
            session: The peer.
            address: The address of the first byte at the peer.
            offset: The offset of its copy in the local arena.
            nbytes: The number of bytes.
            timeout_s: The seconds after which the pull fails; one without time copies nothing, and can be retried.

        Raises:
            TransferError: The bytes did not arrive.
            ValueError: The local range is outside the arena.
        """

    def late(self) -> tuple[ByteRange, ...]:
        """Return the local ranges that failed pulls may still write to."""

    def close(self) -> None:
        """Stop serving and pulling; may block for a second. The arena must stay open until this returns.

        Later pulls raise `TransferError("the backend is closed", retryable=False)`.
        """
