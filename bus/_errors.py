"""The errors of the bus."""

from __future__ import annotations


class BusError(Exception):
    """Any failure of the bus itself; the base of all below."""


class AddressError(BusError):
    """An address is malformed, taken, not to be bound, tcp without CURVE keys, or that of no host of the system."""


class MailboxFullError(BusError):
    """The receiver's bounded queue, or this side's queue towards it, has no room; the message was not accepted."""


class MessageTooLongError(BusError):
    """The encoded message is over `max_message_bytes`. Nothing was sent."""


class AskTimeoutError(BusError):
    """No answer came before the deadline; the receiver may or may not have handled the message."""


class UnreachableError(BusError):
    """The connection to the peer was lost with the ask outstanding; it may or may not have been handled."""


class HandshakeRefusedError(UnreachableError):
    """One side does not accept the other's CURVE key: the text says whose, and what to do. Nothing was sent."""


class _CodedError(BusError):
    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class RemoteError(_CodedError):
    """The other side answered with a `Failure`: `code` is one of `FailureCode`, `detail` one sentence."""


class RefusedError(_CodedError):
    """Raised by a handler to answer an ask with `Failure(code, detail)` and carry on."""
