"""What a mailbox takes in, and how it refuses the rest. Every refusal leaves it alive."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from triptych.bus import (
    AskTimeoutError,
    BusError,
    Delivery,
    Envelope,
    EnvelopeKind,
    Failure,
    Mailbox,
    MailboxFullError,
    Message,
    MessageTooLongError,
    Outbox,
    RemoteError,
    SocketOptions,
    UnreachableError,
)
from triptych.bus._wire import decode_envelope, decode_failure, encode

Run = Callable[..., Any]
LIMIT = 1 << 20


class Add(Message):
    left: int
    right: int


class Grow(Message):
    nbytes: int


class Sum(Message):
    total: int


class Blob(Message):
    data: bytes


class Stranger(Message):
    text: str


def answer(delivery: Delivery) -> None:
    match delivery.message:
        case Add(left, right):
            delivery.reply(Sum(left + right))
        case Grow(nbytes):
            delivery.reply(Blob(bytes(nbytes)))


async def serve(mailbox: Mailbox) -> None:
    while True:
        answer(await mailbox.receive())


@contextlib.asynccontextmanager
async def serving(mailbox: Mailbox) -> AsyncIterator[Mailbox]:
    await mailbox.start()
    task = asyncio.create_task(serve(mailbox))
    try:
        yield mailbox
    finally:
        task.cancel()
        mailbox.close()


@pytest.fixture(params=["over a socket", "within a loop"])
def local(request: pytest.FixtureRequest) -> dict[str, Mailbox] | None:
    """What mailbox and outbox share where they need no socket: all that they promise is the same."""
    return {} if request.param == "within a loop" else None


def adder(folder: Path, **options: Any) -> Mailbox:
    return Mailbox("adder", f"ipc://{folder}/adder", (Add, Grow), **options)


async def still_adds(mailbox: Mailbox) -> None:
    outbox = Outbox("checker")
    reference = outbox.reference("adder", mailbox.address)
    assert await reference.ask(Add(2, 3), Sum, timeout_s=20) == Sum(5)
    outbox.close()


def frame(message: Message, **changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "to": "adder",
        "sender": "raw",
        "kind": EnvelopeKind.ASK,
        "message_id": 5,
        "reply_to": 0,
        "timeout_s": 60.0,
        "generation": 0,
    }
    return encode(Envelope(**fields | changes), message, LIMIT)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (lambda: frame(Stranger("hello")), "unknown_message"),
        (lambda: frame(Add("one", 2)), "invalid_message"),  # type: ignore[arg-type]
        (lambda: frame(Add(1, 2))[:-1], "invalid_message"),
        (lambda: frame(Add(1, 2)) + b"tail", "invalid_message"),
        (lambda: frame(Add(1, 2), to="somebody else"), "refused"),
    ],
    ids=["unknown", "wrong field", "truncated", "trailing bytes", "wrong address"],
)
def test_a_typed_refusal(run: Run, folder: Path, raw_peer: Any, sent: Callable[[], bytes], code: str) -> None:
    async def scenario() -> None:
        async with serving(adder(folder, generation=9)) as mailbox:
            peer = raw_peer(mailbox.address)
            peer.send(sent())
            envelope, body = decode_envelope(await peer.answer())
            assert (envelope.kind, envelope.reply_to) == (EnvelopeKind.FAILURE, 5)
            assert (envelope.to, envelope.sender, envelope.generation) == ("raw", "adder", 9)
            assert decode_failure(body).code == code
            assert [letter.reason for letter in mailbox.dead_letters.recent] == [code]
            await still_adds(mailbox)
            peer.close()

    run(scenario())


@pytest.mark.parametrize(
    "frames",
    [(b"",), (b"\0",), (b"garbage",), (b"a", b"b"), (b"\xff" * 1000,), (b"\0\x01\xc0",)],
)
def test_what_has_no_envelope_is_a_dead_letter(
    run: Run, folder: Path, raw_peer: Any, frames: tuple[bytes, ...]
) -> None:
    async def scenario() -> None:
        async with serving(adder(folder)) as mailbox:
            peer = raw_peer(mailbox.address)
            peer.send(*frames)
            peer.send(frame(Add(2, 3)))  # on the same connection: it arrives after the garbage
            envelope, _ = decode_envelope(await peer.answer())
            assert envelope.kind is EnvelopeKind.REPLY
            assert [letter.reason for letter in mailbox.dead_letters.recent] == ["unreadable"]
            peer.close()

    run(scenario())


@pytest.mark.parametrize("kind", [EnvelopeKind.REPLY, EnvelopeKind.FAILURE])
def test_an_answer_sent_to_a_mailbox_is_not_answered(run: Run, folder: Path, raw_peer: Any, kind: EnvelopeKind) -> None:
    async def scenario() -> None:
        async with serving(adder(folder)) as mailbox:
            peer = raw_peer(mailbox.address)
            peer.send(frame(Failure("refused", "no"), kind=kind))
            peer.send(frame(Add(2, 3), message_id=6))
            envelope, _ = decode_envelope(await peer.answer())
            assert envelope.reply_to == 6
            assert mailbox.dead_letters.count == 1
            peer.close()

    run(scenario())


def test_an_older_generation_is_fenced_off(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        async with serving(adder(folder)) as mailbox:
            old, new, other = Outbox("worker", 100), Outbox("worker", 101), Outbox("other", 1)
            references = [outbox.reference("adder", mailbox.address) for outbox in (old, new, other)]
            for reference in references:
                assert await reference.ask(Add(1, 1), Sum, timeout_s=20) == Sum(2)
            with pytest.raises(RemoteError) as caught:
                await references[0].ask(Add(1, 1), Sum, timeout_s=20)
            assert caught.value.code == "stale_generation"
            (letter,) = mailbox.dead_letters.recent
            assert (letter.sender, letter.generation) == ("worker", 100)
            assert await references[1].ask(Add(1, 1), Sum, timeout_s=20) == Sum(2)
            await still_adds(mailbox)  # generation 0 is never fenced
            for outbox in (old, new, other):
                outbox.close()

    run(scenario())


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (lambda: frame(Add("one", 2), sender="worker", generation=200), "invalid_message"),  # type: ignore[arg-type]
        (lambda: frame(Add(1, 2), to="else", sender="worker", generation=200), "refused"),
        (lambda: frame(Add(1, 2), sender="worker", generation=-1), "unreadable"),
    ],
    ids=["no message", "not for it", "no generation"],
)
def test_a_message_that_is_not_in_order_fences_nobody(
    run: Run, folder: Path, raw_peer: Any, sent: Callable[[], bytes], reason: str
) -> None:
    async def scenario() -> None:
        async with serving(adder(folder)) as mailbox:
            peer = raw_peer(mailbox.address)
            peer.send(sent())
            peer.send(frame(Add(1, 2), sender="worker", generation=100, message_id=7))
            while (envelope := decode_envelope(await peer.answer())[0]).reply_to != 7:
                pass
            assert envelope.kind is EnvelopeKind.REPLY
            assert [letter.reason for letter in mailbox.dead_letters.recent] == [reason]
            peer.close()

    run(scenario())


def test_the_generation_of_a_sender_that_is_no_component_counts_for_nothing(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        mailbox = adder(folder, component_of=lambda sender: sender.partition(".")[0] if "worker" in sender else "")
        async with serving(mailbox):
            for name, generation in (("stranger", 200), ("stranger", 100), ("worker.child", 100)):
                outbox = Outbox(name, generation)
                assert await outbox.reference("adder", mailbox.address).ask(Add(1, 1), Sum, timeout_s=20) == Sum(2)
                outbox.close()
            old = Outbox("worker", 99)
            with pytest.raises(RemoteError, match="100 is known"):
                await old.reference("adder", mailbox.address).ask(Add(1, 1), Sum, timeout_s=20)
            old.close()
            assert mailbox._generations == {"worker": 100}

    run(scenario())


def test_an_urgent_message_is_answered_on_arrival_though_the_queue_is_full(run: Run, folder: Path, local: Any) -> None:
    async def scenario() -> None:
        mailbox = Mailbox("adder", f"ipc://{folder}/adder", (Add,), capacity=2, urgent={Grow: answer}, local=local)
        await mailbox.start()
        outbox = Outbox("test", local=local)
        reference = outbox.reference("adder", mailbox.address)
        asks = [asyncio.ensure_future(reference.ask(Add(n, n), Sum, timeout_s=20)) for n in range(2)]
        for _ in range(3):  # nobody receives: only what is urgent is answered
            assert await reference.ask(Grow(1), Blob, timeout_s=20) == Blob(b"\0")
        assert mailbox.depth == 2
        assert not any(ask.done() for ask in asks)
        mailbox.close()
        outbox.close()
        await asyncio.gather(*asks, return_exceptions=True)

    run(scenario())


def test_an_ask_whose_deadline_passes_in_the_queue_is_not_received(run: Run, folder: Path, local: Any) -> None:
    async def scenario() -> None:
        mailbox = adder(folder, local=local)
        await mailbox.start()
        outbox = Outbox("test", local=local)
        reference = outbox.reference("adder", mailbox.address)
        reference.tell(Add(0, 0))
        await mailbox.receive()  # so the connection stands, and the next ask is sent at once
        with pytest.raises(AskTimeoutError):
            await reference.ask(Add(1, 1), Sum, timeout_s=0)
        reference.tell(Add(2, 2))
        assert (await mailbox.receive()).message == Add(2, 2)
        assert [letter.reason for letter in mailbox.dead_letters.recent] == ["deadline_exceeded"]
        mailbox.close()
        outbox.close()

    run(scenario())


def test_a_full_mailbox_tells_both_asker_and_teller(run: Run, folder: Path, local: Any) -> None:
    async def scenario() -> None:
        mailbox = adder(folder, capacity=3, local=local)
        await mailbox.start()
        outbox = Outbox("test", local=local)
        reference = outbox.reference("adder", mailbox.address)
        asks = [asyncio.ensure_future(reference.ask(Add(n, n), Sum, timeout_s=20)) for n in range(5)]
        refused, _ = await asyncio.wait(asks[3:])
        assert all(isinstance(ask.exception(), MailboxFullError) for ask in refused)
        assert mailbox.depth == mailbox.capacity == 3
        reference.tell(Add(0, 0))
        with pytest.raises(MailboxFullError):  # behind the tell, on the same connection
            await reference.ask(Add(0, 0), Sum, timeout_s=20)
        assert [letter.reason for letter in outbox.dead_letters.recent] == ["mailbox_full"]
        for _ in range(3):
            answer(await mailbox.receive())
        assert await asyncio.gather(*asks[:3]) == [Sum(0), Sum(2), Sum(4)]
        assert mailbox.depth == 0
        assert mailbox.dead_letters.count == 4
        mailbox.close()
        outbox.close()

    run(scenario())


def test_too_long_is_refused_here_and_there(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        async with serving(adder(folder, options=SocketOptions(max_message_bytes=10_000))) as mailbox:
            careful = Outbox("careful", options=SocketOptions(max_message_bytes=10_000))
            with pytest.raises(MessageTooLongError):
                careful.reference("adder", mailbox.address).tell(Blob(bytes(11_000)))
            bold = Outbox("bold")
            with pytest.raises(RemoteError, match="limit is 10000") as caught:
                await bold.reference("adder", mailbox.address).ask(Blob(bytes(15_000)), Sum, timeout_s=20)
            assert caught.value.code == "invalid_message"
            await still_adds(mailbox)
            careful.close()
            bold.close()

    run(scenario())


def test_a_far_too_long_frame_costs_its_sender_the_connection(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        async with serving(adder(folder, options=SocketOptions(max_message_bytes=10_000))) as mailbox:
            outbox = Outbox("bold")
            reference = outbox.reference("adder", mailbox.address)
            assert await reference.ask(Add(1, 1), Sum, timeout_s=20) == Sum(2)
            down = asyncio.ensure_future(reference.down())
            reference.tell(Blob(bytes(1_000_000)))
            await down
            assert await reference.ask(Add(1, 1), Sum, timeout_s=20) == Sum(2)
            await still_adds(mailbox)
            outbox.close()

    run(scenario())


def test_an_answer_that_is_too_long_reaches_the_asker_as_a_failure(run: Run, folder: Path, local: Any) -> None:
    async def scenario() -> None:
        async with serving(adder(folder, options=SocketOptions(max_message_bytes=10_000), local=local)) as mailbox:
            outbox = Outbox("test", local=local)
            reference = outbox.reference("adder", mailbox.address)
            with pytest.raises(RemoteError, match="Blob has") as caught:
                await reference.ask(Grow(20_000), Blob, timeout_s=20)
            assert caught.value.code == "invalid_message"
            assert mailbox.dead_letters.count == 1
            await still_adds(mailbox)
            outbox.close()

    run(scenario())


def test_a_handler_may_fail_an_ask_with_a_code_of_its_own(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        mailbox = adder(folder)
        await mailbox.start()
        outbox = Outbox("test")
        ask = asyncio.ensure_future(outbox.reference("adder", mailbox.address).ask(Add(1, 1), Sum, timeout_s=20))
        delivery = await mailbox.receive()
        delivery.fail("no_credit", "come back later")
        with pytest.raises(RemoteError) as caught:
            await ask
        assert (caught.value.code, caught.value.detail) == ("no_credit", "come back later")
        with pytest.raises(BusError, match="already answered"):
            delivery.reply(Sum(2))
        mailbox.close()
        outbox.close()

    run(scenario())


def test_a_refused_tell_is_a_dead_letter_of_its_sender(run: Run, folder: Path, local: Any) -> None:
    async def scenario() -> None:
        async with serving(adder(folder, local=local)) as mailbox:
            outbox = Outbox("test", local=local)
            reference = outbox.reference("adder", mailbox.address)
            reference.tell(Stranger("hello"))
            reference.tell(Add(1, 2))  # handled; a reply to a tell goes nowhere
            await reference.ask(Add(1, 1), Sum, timeout_s=20)
            assert [letter.reason for letter in outbox.dead_letters.recent] == ["unknown_message"]
            outbox.close()

    run(scenario())


def test_closing_answers_those_who_wait(run: Run, folder: Path, local: Any) -> None:
    async def scenario() -> None:
        mailbox = adder(folder, capacity=1, local=local)
        await mailbox.start()
        outbox = Outbox("test", local=local)
        reference = outbox.reference("adder", mailbox.address)
        handled = asyncio.ensure_future(reference.ask(Add(0, 0), Sum, timeout_s=20))
        delivery = await mailbox.receive()
        waiting = asyncio.ensure_future(reference.ask(Add(1, 0), Sum, timeout_s=20))
        await asyncio.sleep(0)
        with pytest.raises(MailboxFullError):  # so the one before it is in the queue
            await reference.ask(Add(2, 0), Sum, timeout_s=20)
        mailbox.close()
        with pytest.raises(RemoteError) as caught:
            await waiting
        assert caught.value.code == "stopping"
        with pytest.raises(UnreachableError):
            await handled
        delivery.reply(Sum(0))
        assert mailbox.dead_letters.recent[-1].reason == "mailbox_closed"
        with pytest.raises(BusError, match="not open"):
            await mailbox.receive()
        outbox.close()

    run(scenario())


def test_an_answer_to_an_asker_that_has_gone_is_a_dead_letter(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        async with serving(adder(folder)) as mailbox:
            asked = Envelope("adder", "ghost", EnvelopeKind.ASK, 1, 0, 60.0, 0)
            Delivery(mailbox, b"no such route", asked, Add(1, 1)).reply(Sum(2))
            assert [letter.reason for letter in mailbox.dead_letters.recent] == ["peer_gone"]
            await still_adds(mailbox)

    run(scenario())


def test_an_answer_to_an_asker_of_the_same_loop_that_has_gone_is_a_dead_letter(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        local: dict[str, Mailbox] = {}
        mailbox = adder(folder, local=local)
        await mailbox.start()
        outbox = Outbox("test", local=local)
        ask = asyncio.ensure_future(outbox.reference("adder", mailbox.address).ask(Add(1, 1), Sum, timeout_s=20))
        delivery = await mailbox.receive()
        outbox.close()
        answer(delivery)
        assert [letter.reason for letter in mailbox.dead_letters.recent] == ["peer_gone"]
        with pytest.raises(UnreachableError, match="this side closed"):
            await ask
        mailbox.close()

    run(scenario())


def test_the_messages_of_each_sender_stay_in_order_whichever_way_they_come(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        local: dict[str, Mailbox] = {}
        mailbox = adder(folder, local=local)
        await mailbox.start()
        senders = [Outbox("near", local=local), Outbox("far")]
        for number in range(50):
            for outbox in senders:
                outbox.reference("adder", mailbox.address).tell(Add(number, 0))
        came = [await mailbox.receive() for _ in range(100)]
        for outbox in senders:
            found = [each.message for each in came if each.sender.name == outbox.name]
            assert found == [Add(number, 0) for number in range(50)]
            outbox.close()
        mailbox.close()

    run(scenario())


def test_a_cancelled_receive_loses_nothing(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        mailbox = adder(folder)
        await mailbox.start()
        waiting = asyncio.ensure_future(mailbox.receive())
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        task = asyncio.create_task(serve(mailbox))
        await still_adds(mailbox)
        task.cancel()
        mailbox.close()

    run(scenario())
