"""The typed message bus: mailboxes, references, dead letters. Knows no actor and no tensor."""

from bus.address import Address, parse_address
from bus.binding import remove_if_stale
from bus.dead_letters import DeadLetter, DeadLetters
from bus.envelope import Envelope, Failure, FailureCode, Generation, Kind
from bus.errors import (
    AddressError,
    AskTimeout,
    BusError,
    HandshakeRefused,
    MailboxFull,
    MessageTooLong,
    Refused,
    RemoteFailure,
    Unreachable,
)
from bus.mailbox import Delivery, Mailbox
from bus.message import Message
from bus.outbox import Outbox, Reference
from bus.sockets import CurveKeys
from bus.trace import child_of, current_traceparent, new_traceparent

__all__ = [
    "Address",
    "AddressError",
    "AskTimeout",
    "BusError",
    "CurveKeys",
    "DeadLetter",
    "DeadLetters",
    "Delivery",
    "Envelope",
    "Failure",
    "FailureCode",
    "Generation",
    "HandshakeRefused",
    "Kind",
    "Mailbox",
    "MailboxFull",
    "Message",
    "MessageTooLong",
    "Outbox",
    "Reference",
    "Refused",
    "RemoteFailure",
    "Unreachable",
    "child_of",
    "current_traceparent",
    "new_traceparent",
    "parse_address",
    "remove_if_stale",
]
