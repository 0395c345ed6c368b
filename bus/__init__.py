"""The typed message bus: mailboxes, references, dead letters. Knows no actor and no tensor."""

from triptych.bus.address import Address, parse_address
from triptych.bus.binding import remove_if_stale
from triptych.bus.dead_letters import DeadLetter, DeadLetters
from triptych.bus.envelope import Envelope, Failure, FailureCode, Generation, Kind
from triptych.bus.errors import (
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
from triptych.bus.mailbox import Delivery, Mailbox
from triptych.bus.message import Message
from triptych.bus.outbox import Outbox, Reference
from triptych.bus.sockets import CurveKeys
from triptych.bus.trace import child_of, current_traceparent, new_traceparent

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
