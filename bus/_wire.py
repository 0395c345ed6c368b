"""Messages, and how one travels: as one ZMQ frame of 2 bytes of length, the envelope, and the body; both msgpack.

One frame in place of two saves a send, a receive and a look at RCVMORE, which together cost more than the
encoding itself. The body is decoded apart from the envelope so that a bad body can still be answered.
"""

from __future__ import annotations

from enum import Enum, StrEnum
from functools import cache
from typing import Annotated, Any, Final, NamedTuple, dataclass_transform

import msgspec
from msgspec import Meta

from triptych.bus._errors import MessageTooLongError

MAX_GENERATION: Final = (1 << 53) - 1
"""Above every generation: those are milliseconds since 1970."""
MAX_NAME: Final = 128
"""Most characters in the name of an actor."""
_LENGTH_BYTES: Final = 2

# The decoder refuses what is out of these ranges, whatever a peer sends.
Generation = Annotated[int, Meta(ge=0, le=MAX_GENERATION)]
MessageId = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Name = Annotated[str, Meta(max_length=MAX_NAME)]


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class Message(
    msgspec.Struct,
    frozen=True,
    tag=True,
    array_like=True,
    gc=False,
    forbid_unknown_fields=True,
):
    """A typed message; its class name is its tag on the wire.

    Subclasses are plain annotated fields, each with a line of docstring. Fields hold scalars, strings,
    bytes, tuples, dicts, `msgspec.Struct`s and unions of those; never a tensor, never a live object.
    """


class EnvelopeKind(Enum):
    """Whether an envelope has a message (tell, ask) or an answer (reply, failure)."""

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
    """The head of every message on the wire: receiver, sender, kind and deadline."""

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
    """Seconds that the sender of an ask waits for the answer, from sending; 0.0 for any other kind.

    A duration and not a point in time: the clocks of two processes may differ, and either may be set meanwhile.
    """
    generation: Generation
    """Incarnation of the sender; 0 = an unfenced client."""


class Failure(Message):
    """The body of an envelope of kind `FAILURE`."""

    code: str
    """One of `FailureCode`, or a code of the handler's own."""
    detail: str
    """One sentence for the log and the caller."""


_encode = msgspec.msgpack.Encoder().encode
_decode_envelope = msgspec.msgpack.Decoder(Envelope).decode
_decode_failure = msgspec.msgpack.Decoder(Failure).decode
_decode_tag = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


class UnreadableError(Exception):
    """No envelope could be read; the text says why."""


class BadBodyError(Exception):
    """The body cannot be decoded, the envelope can: `code` is "unknown_message" or "invalid_message"."""

    def __init__(self, code: FailureCode, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


def encode(envelope: Envelope, message: Message, max_bytes: int) -> bytes:
    """Return the frame of `message`; raises `MessageTooLongError` when it has more than `max_bytes` bytes."""
    head = _encode(envelope)
    frame = len(head).to_bytes(_LENGTH_BYTES, "big") + head + _encode(message)
    if len(frame) > max_bytes:
        raise MessageTooLongError(f"{type(message).__name__} has {len(frame)} bytes, the limit is {max_bytes}")
    return frame


def decode_envelope(frames: list[bytes]) -> tuple[Envelope, memoryview]:
    """Return the envelope and the bytes of the body; raises `UnreadableError`."""
    if len(frames) != 1:
        raise UnreadableError(f"{len(frames)} frames in place of one")
    view = memoryview(frames[0])
    end = _LENGTH_BYTES + int.from_bytes(view[:_LENGTH_BYTES], "big")
    if len(view) < end:
        raise UnreadableError(f"a frame of {len(view)} bytes is cut off")
    try:
        return _decode_envelope(view[_LENGTH_BYTES:end]), view[end:]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnreadableError(f"no envelope: {error}") from error


class BodyDecoder:
    """Decodes a body as one of `messages`, a tagged union: one decoder for all of them."""

    def __init__(self, messages: tuple[type[Message], ...]) -> None:
        if not messages:
            raise TypeError("at least one message type is needed")
        union: Any = messages[0]
        for message in messages[1:]:
            union |= message
        self._decode = msgspec.msgpack.Decoder(union).decode
        self._names = frozenset(message.__struct_config__.tag for message in messages)

    def decode(self, body: memoryview) -> Message:
        """Return the message; raises `BadBodyError`."""
        try:
            message: Message = self._decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise self._body_error(body, error) from error
        return message

    def _body_error(self, body: memoryview, error: Exception) -> BadBodyError:
        tag = _read_tag(body)
        if tag is None or tag in self._names:
            return BadBodyError(FailureCode.INVALID_MESSAGE, f"{tag or 'body'}: {error}")
        return BadBodyError(FailureCode.UNKNOWN_MESSAGE, f"{tag[:80]!r} is not understood here")


def decode_failure(body: memoryview) -> Failure:
    """Return the body of an envelope of kind `FAILURE`; if it cannot be read, a failure that says so."""
    try:
        return _decode_failure(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Failure(FailureCode.INVALID_MESSAGE, f"the failure itself is unreadable: {error}")


@cache
def decoder_of(*messages: type[Message]) -> BodyDecoder:
    """Return the decoder of `messages`; each combination is made once."""
    return BodyDecoder(messages)


def _read_tag(body: memoryview) -> str | None:
    try:
        return msgspec.msgpack.decode(_decode_tag(body)[0], type=str)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, IndexError):
        return None  # not even a tag: the caller's own error says what is wrong
