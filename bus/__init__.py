"""The typed message bus: mailboxes, references, dead letters. Knows no actor and no tensor."""

from triptych.bus._address import Address, parse_address
from triptych.bus._binding import remove_if_stale
from triptych.bus._dead_letters import DeadLetter, DeadLetters
from triptych.bus._errors import (
    AddressError,
    AskTimeoutError,
    BusError,
    HandshakeRefusedError,
    MailboxFullError,
    MessageTooLongError,
    RefusedError,
    RemoteError,
    UnreachableError,
)
from triptych.bus._mailbox import Delivery, Mailbox
from triptych.bus._outbox import Outbox, Reference
from triptych.bus._sockets import HEARTBEATS_LOST, CurveKeys, HostKey, SocketOptions, is_public_key
from triptych.bus._wire import Envelope, EnvelopeKind, Failure, FailureCode, Generation, Message, Sender

__all__ = [
    "HEARTBEATS_LOST",
    "Address",
    "AddressError",
    "AskTimeoutError",
    "BusError",
    "CurveKeys",
    "DeadLetter",
    "DeadLetters",
    "Delivery",
    "Envelope",
    "EnvelopeKind",
    "Failure",
    "FailureCode",
    "Generation",
    "HandshakeRefusedError",
    "HostKey",
    "Mailbox",
    "MailboxFullError",
    "Message",
    "MessageTooLongError",
    "Outbox",
    "Reference",
    "RefusedError",
    "RemoteError",
    "Sender",
    "SocketOptions",
    "UnreachableError",
    "is_public_key",
    "parse_address",
    "remove_if_stale",
]
