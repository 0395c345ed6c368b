"""What a transfer can fail with."""

from __future__ import annotations


class TransferError(Exception):
    """Bytes that did not arrive.

    Attributes: reason: A sentence for the log and for the head. retryable: Whether the same pull can
    succeed later. quarantine: Whether something may still write to the local block: it must not be leased
    again before that ends.

    """

    def __init__(self, reason: str, *, retryable: bool, quarantine: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retryable = retryable
        self.quarantine = quarantine


class TransferSetupError(Exception):
    """A backend that cannot work here; the sentence says what to install or to set."""
