from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.bus import Envelope, EnvelopeKind, Failure, Message, MessageTooLongError
from triptych.bus._wire import (
    MAX_GENERATION,
    MAX_NAME,
    BadBodyError,
    BodyDecoder,
    UnreadableError,
    decode_envelope,
    decode_failure,
    decoder_of,
    encode,
)


class Point(Message):
    x: int
    label: str = ""


class Line(Message):
    ends: tuple[int, int]


ENVELOPE = Envelope("head", "api", EnvelopeKind.ASK, 3, 0, 1.5, 7)
LIMIT = 1 << 20
DECODER = BodyDecoder((Point, Line))

envelopes = st.builds(
    Envelope,
    to=st.text(max_size=40),
    sender=st.text(max_size=40),
    kind=st.sampled_from(EnvelopeKind),
    message_id=st.integers(0, 2**63 - 1),
    reply_to=st.integers(0, 2**63 - 1),
    timeout_s=st.floats(min_value=0),
    generation=st.integers(0, MAX_GENERATION),
)
messages = st.builds(Point, x=st.integers(-(2**63), 2**63), label=st.text()) | st.builds(
    Line, ends=st.tuples(st.integers(0, 9), st.integers(0, 9))
)


@given(envelopes, messages)
def test_what_is_encoded_is_decoded(envelope: Envelope, message: Message) -> None:
    decoded, body = decode_envelope([encode(envelope, message, LIMIT)])
    assert decoded == envelope
    assert DECODER.decode(body) == message


@given(envelopes, messages, st.data())
def test_a_cut_frame_is_an_error_of_ours(envelope: Envelope, message: Message, data: st.DataObject) -> None:
    frame = encode(envelope, message, LIMIT)
    cut = frame[: data.draw(st.integers(0, len(frame) - 1))]
    with pytest.raises((UnreadableError, BadBodyError)):
        DECODER.decode(decode_envelope([cut])[1])


def body_of(*fields: object) -> memoryview:
    return memoryview(msgspec.msgpack.encode(fields))


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (body_of("Circle", 1), "unknown_message"),
        (body_of("Point", "one"), "invalid_message"),
        (body_of("Point", 1, "a", "too many"), "invalid_message"),
        (body_of("Point"), "invalid_message"),
        (body_of("Line", [1, 2, 3]), "invalid_message"),
        (body_of(), "invalid_message"),
        (body_of(17, 1), "invalid_message"),
        (memoryview(b""), "invalid_message"),
        (memoryview(b"\xc1"), "invalid_message"),
        (memoryview(b"\x91" * 5000), "invalid_message"),
        (memoryview(b"\x92\xa5Point\xff\xff"), "invalid_message"),
    ],
)
def test_a_bad_body_says_what_is_wrong(body: memoryview, code: str) -> None:
    with pytest.raises(BadBodyError) as caught:
        DECODER.decode(body)
    assert caught.value.code == code
    assert caught.value.detail


def test_an_envelope_with_a_field_too_many_is_refused() -> None:
    fields = [*msgspec.to_builtins(ENVELOPE), "more"]
    head = msgspec.msgpack.encode(fields)
    with pytest.raises(UnreadableError):
        decode_envelope([len(head).to_bytes(2, "big") + head])


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": -1},
        {"generation": MAX_GENERATION + 1},
        {"message_id": -1},
        {"reply_to": 2**63},
        {"timeout_s": -1.0},
        {"to": "x" * (MAX_NAME + 1)},
        {"sender": "x" * (MAX_NAME + 1)},
    ],
    ids=str,
)
def test_an_envelope_out_of_range_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UnreadableError, match="no envelope"):
        decode_envelope([encode(msgspec.structs.replace(ENVELOPE, **changes), Point(1), LIMIT)])


@pytest.mark.parametrize("frames", [[], [b""], [b"\0"], [b"ab", b"cd"]])
def test_not_one_whole_frame(frames: list[bytes]) -> None:
    with pytest.raises(UnreadableError):
        decode_envelope(frames)


def test_the_limit_is_exact() -> None:
    size = len(encode(ENVELOPE, Point(1, "x" * 1000), LIMIT))
    assert encode(ENVELOPE, Point(1, "x" * 1000), size)
    with pytest.raises(MessageTooLongError, match="Point"):
        encode(ENVELOPE, Point(1, "x" * 1000), size - 1)


def test_a_failure_that_cannot_be_read_is_still_a_failure() -> None:
    _, body = decode_envelope([encode(ENVELOPE, Failure("refused", "no"), LIMIT)])
    assert decode_failure(body) == Failure("refused", "no")
    assert decode_failure(memoryview(b"\xc1")).code == "invalid_message"


def test_decoders_are_made_once() -> None:
    assert decoder_of(Point, Line) is decoder_of(Point, Line)
    with pytest.raises(TypeError):
        decoder_of()
