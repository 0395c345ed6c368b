"""Whatever bytes come, each is accounted for, and the mailbox answers the next good message."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triptych.bus import Envelope, EnvelopeKind, Mailbox, Message, Outbox
from triptych.bus._wire import decode_envelope, encode


class Count(Message):
    number: int
    label: str
    parts: tuple[bytes, ...]


class Counted(Message):
    number: int


def good(message_id: int) -> bytes:
    envelope = Envelope("counter", "fuzz", EnvelopeKind.ASK, message_id, 0, 60.0, 0)
    return encode(envelope, Count(message_id, "label", (b"part",)), 1 << 20)


@st.composite
def mangled(draw: st.DrawFn) -> bytes:
    """A good frame with a few bytes changed, cut out or put in."""
    frame = bytearray(good(1))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(frame)))
        frame[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(frame)


scalars = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
packed = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(), inner, max_size=3)
).map(msgspec.msgpack.encode)


def framed(parts: tuple[bytes, bytes]) -> bytes:
    return len(parts[0]).to_bytes(2, "big") + b"".join(parts)


headed = st.tuples(packed, packed).map(framed)
integers = st.integers(0, 9) | st.integers(-9, 9) | st.integers(-(2**63), 2**64 - 1)
envelopes = st.tuples(
    *(st.just("counter"), st.sampled_from(("fuzz", "other")) | st.text(), st.sampled_from((0, 1, 1, 2, 3, 4))),
    *(integers, integers, st.just(60.0) | st.floats(), integers, st.just("") | st.text()),
).map(msgspec.msgpack.encode)
addressed = st.tuples(envelopes, packed | st.just(msgspec.msgpack.encode(Count(1, "", ())))).map(framed)
frames = st.lists(st.binary(max_size=200) | packed | headed | mangled(), min_size=1, max_size=3) | st.lists(
    addressed, min_size=1, max_size=1
)


class Accounted:
    """A mailbox, all that came in, and a loop that lives as long as the whole run of examples."""

    def __init__(self, address: str, raw_peer: Any) -> None:
        self.mailbox = Mailbox("counter", address, (Count,), generation=1)
        self._address = address
        self._raw_peer = raw_peer
        self._delivered = 0
        self._sent = 0

    async def open(self) -> None:
        await self.mailbox.start()
        self._peer = self._raw_peer(self._address)
        self._task = asyncio.create_task(self._serve())

    async def close(self) -> None:
        self._task.cancel()
        self._peer.close()
        self.mailbox.close()

    async def _serve(self) -> None:
        while True:
            delivery = await self.mailbox.receive()
            self._delivered += 1
            delivery.reply(Counted(delivery.envelope.message_id))

    async def survive(self, messages: list[list[bytes]]) -> None:
        """Send `messages`, then a good one behind them on the same connection, and await its answer."""
        self._sent += len(messages) + 1
        for message in messages:
            self._peer.send(*message)
        last = 2**60 + self._sent
        self._peer.send(good(last))
        async with asyncio.timeout(20):
            while True:
                envelope, _ = decode_envelope(await self._peer.answer())
                if envelope.reply_to == last:
                    break
        assert envelope.kind is EnvelopeKind.REPLY
        assert self.mailbox.dead_letters.count + self._delivered == self._sent


def test_the_mailbox_outlives_garbage(run: Callable[..., Any], folder: Path, raw_peer: Any) -> None:
    accounted = Accounted(f"ipc://{folder}/counter", raw_peer)
    run(accounted.open())

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(frames, max_size=4))
    def survives(messages: list[list[bytes]]) -> None:
        run(accounted.survive(messages))

    survives()
    run(accounted.close())


@pytest.mark.parametrize(
    "noise", [b"", b"\0" * 64, b"GET / HTTP/1.1\r\n\r\n", b"\xff" + b"\0" * 8 + b"\x7f" + b"\xff" * 99]
)
def test_the_mailbox_outlives_those_who_speak_no_zmq(run: Callable[..., Any], folder: Path, noise: bytes) -> None:
    async def scenario() -> None:
        mailbox = Mailbox("counter", f"ipc://{folder}/counter", (Count,))
        await mailbox.start()
        for _ in range(20):
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(str(folder / "counter"))
                stranger.sendall(noise)
        outbox = Outbox("test")
        ask = asyncio.ensure_future(
            outbox.reference("counter", mailbox.address).ask(Count(1, "", ()), Counted, timeout_s=20)
        )
        (await mailbox.receive()).reply(Counted(1))
        assert await ask == Counted(1)
        outbox.close()
        mailbox.close()

    run(scenario())
