"""The head of every message on the wire."""

from __future__ import annotations

from enum import Enum, StrEnum
from typing import Annotated, Final, NamedTuple

import msgspec
from msgspec import Meta

from triptych.bus._message import Message

MAX_GENERATION: Final = (1 << 53) - 1
"""Larger than any, which are milliseconds since 1970."""
MAX_NAME: Final = 128

# Whatever a peer sends, these are what the decoder lets through.
Generation = Annotated[int, Meta(ge=0, le=MAX_GENERATION)]
MessageId = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Name = Annotated[str, Meta(max_length=MAX_NAME)]


class EnvelopeKind(Enum):
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


class Sender(NamedTuple):
    """Who sent a message, as its envelope says."""

    name: str
    """Name of the sending actor."""
    generation: int
    """Its incarnation; 0 = an unfenced client."""


class Envelope(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Who sends what to whom, and until when an answer is of use."""

    to: Name
    """Name of the receiving actor."""
    sender: Name
    """Name of the sending actor."""
    kind: EnvelopeKind
    """Tell, ask, reply or failure."""
    message_id: MessageId
    """Unique within one incarnation of the sender."""
    reply_to: MessageId
    """`message_id` of the message that this one answers; 0 if it answers none."""
    timeout_s: Annotated[float, Meta(ge=0)]
    """Seconds from the sending of an ask in which its answer is of use; 0.0 in what is no ask.

    A duration and not a point in time: the clocks of two processes may differ, and either may be set meanwhile.
    """
    generation: Generation
    """Incarnation of the sender; 0 = an unfenced client."""


class Failure(Message):
    """The body of an envelope of kind `FAILURE`: a typed "no"."""

    code: str
    """One of `FailureCode`, or a code of the handler's own."""
    detail: str
    """One sentence for the log and the caller."""
