"""One message as one ZMQ frame: 2 bytes of length, the envelope, the body; both msgpack.

One frame in place of two saves a send, a receive and a look at RCVMORE, which together cost more than the
encoding itself. The body is decoded apart from the envelope so that a bad body can still be answered.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Final

import msgspec

from triptych.bus._envelope import Envelope, Failure, FailureCode
from triptych.bus._errors import MessageTooLongError
from triptych.bus._message import Message

DEFAULT_MAX_MESSAGE_BYTES: Final = 1 << 20
_LENGTH_BYTES: Final = 2

_encode = msgspec.msgpack.Encoder().encode
_decode_envelope = msgspec.msgpack.Decoder(Envelope).decode
_decode_failure = msgspec.msgpack.Decoder(Failure).decode
_decode_tag = msgspec.msgpack.Decoder(list[msgspec.Raw]).decode


class UnreadableError(Exception):
    """No envelope could be read; the text says why."""


class BadBodyError(Exception):
    """The envelope is fine, the body is not: `code` is "unknown_message" or "invalid_message"."""

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
    """Return the body of an envelope of kind `FAILURE`; one that cannot be read is a failure, too."""
    try:
        return _decode_failure(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return Failure(FailureCode.INVALID_MESSAGE, f"the failure itself is unreadable: {error}")


@cache
def decoder_of(*messages: type[Message]) -> BodyDecoder:
    """Return the decoder of `messages`, made once for each combination that the program asks for."""
    return BodyDecoder(messages)


def _read_tag(body: memoryview) -> str | None:
    try:
        return msgspec.msgpack.decode(_decode_tag(body)[0], type=str)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, IndexError):
        return None  # not even a tag: the caller's own error says what is wrong
