"""The head of every message on the wire."""

from __future__ import annotations

from enum import Enum, StrEnum

import msgspec

from bus.message import Message


class Kind(Enum):
    """What an envelope asks of its receiver."""

    TELL = 0
    ASK = 1
    REPLY = 2
    FAILURE = 3


class FailureCode(StrEnum):
    """The codes that the bus and the actor runtime put in a `Failure`; handlers may add their own."""

    MAILBOX_FULL = "mailbox_full"
    UNKNOWN_MESSAGE = "unknown_message"
    INVALID_MESSAGE = "invalid_message"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    STALE_GENERATION = "stale_generation"
    REFUSED = "refused"
    HANDLER_FAILED = "handler_failed"
    STOPPING = "stopping"


class Envelope(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Who sends what to whom, and until when an answer is of use."""

    to: str
    """Name of the receiving actor."""
    sender: str
    """Name of the sending actor."""
    kind: Kind
    """Tell, ask, reply or failure."""
    message_id: int
    """Unique within one incarnation of the sender."""
    reply_to: int
    """`message_id` of the message that this one answers; 0 if it answers none."""
    deadline: float
    """Unix seconds after which the answer is of no use; 0.0 = none. An ask always has one."""
    generation: int
    """Incarnation of the sender; 0 = an unfenced client."""
    traceparent: str
    """W3C trace context of the sender's span; "" = not traced."""


class Failure(Message):
    """The body of an envelope of kind `FAILURE`: a typed "no"."""

    code: str
    """One of `FailureCode`, or a code of the handler's own."""
    detail: str
    """One sentence for the log and the caller."""
