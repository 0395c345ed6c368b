"""Asking and telling: every way that it can end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import zmq

from triptych.bus import (
    AddressError,
    AskTimeoutError,
    CurveKeys,
    Delivery,
    Envelope,
    EnvelopeKind,
    HandshakeRefusedError,
    Mailbox,
    MailboxFullError,
    Message,
    Outbox,
    RemoteError,
    SocketOptions,
    UnreachableError,
)
from triptych.bus._pump import Pump
from triptych.bus._wire import encode

Run = Callable[..., Any]
KEYS = CurveKeys.new()
WITH_KEYS = SocketOptions(curve=KEYS)
WITH_OTHER_KEYS = SocketOptions(curve=CurveKeys.new())
AUTH, HUNG_UP = zmq.EVENT_HANDSHAKE_FAILED_AUTH, zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
PROTOCOL = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


class Echo(Message):
    text: str


class Silence(Message):
    pass


class Echoed(Message):
    text: str


class Refusal(Message):
    why: str


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def answer(delivery: Delivery) -> None:
    match delivery.message:
        case Echo("refuse"):
            delivery.reply(Refusal("as told"))
        case Echo(text):
            delivery.reply(Echoed(text))


async def serve(mailbox: Mailbox) -> None:
    while True:
        answer(await mailbox.receive())


@contextlib.asynccontextmanager
async def serving(address: str, **options: Any) -> AsyncIterator[Mailbox]:
    mailbox = Mailbox("echo", address, (Echo, Silence), **options)
    await mailbox.start()
    task = asyncio.create_task(serve(mailbox))
    try:
        yield mailbox
    finally:
        task.cancel()
        mailbox.close()


@contextlib.contextmanager
def sending(*arguments: Any, **options: Any) -> Any:
    outbox = Outbox(*arguments or ("test",), **options)
    try:
        yield outbox
    finally:
        outbox.close()


@pytest.mark.parametrize("transport", ["inproc", "ipc", "tcp"])
def test_every_transport_asks_tells_and_sees_the_peer_go(run: Run, folder: Path, transport: str) -> None:
    address = {
        "inproc": f"inproc://{folder}",
        "ipc": f"ipc://{folder}/echo",
        "tcp": f"tcp://127.0.0.1:{free_port()}",
    }[transport]

    async def scenario() -> None:
        with sending(options=WITH_KEYS) as outbox:
            reference = outbox.reference("echo", address)
            early = asyncio.ensure_future(reference.ask(Echo("early"), Echoed, timeout_s=20))
            async with serving(address, options=WITH_KEYS) as mailbox:
                assert await early == Echoed("early")
                reference.tell(Echo("told"))
                assert await reference.ask(Echo("hi"), Echoed, timeout_s=20) == Echoed("hi")
                silent = asyncio.ensure_future(reference.ask(Silence(), Echoed, timeout_s=20))
                down = asyncio.ensure_future(reference.down())
                await asyncio.sleep(0)  # both have begun: the next ask is behind the silent one
                assert await reference.ask(Echo("hi"), Echoed, timeout_s=20) == Echoed("hi")
                assert not down.done()
                mailbox.close()
            await down
            with pytest.raises(UnreachableError, match="lost"):
                await silent

    run(scenario())


@pytest.mark.parametrize("transport", ["inproc", "ipc", "none"])
def test_a_mailbox_opened_again_is_reached_by_the_same_reference(run: Run, folder: Path, transport: str) -> None:
    address = f"inproc://{folder}" if transport == "inproc" else f"ipc://{folder}/echo"
    local: dict[str, Mailbox] | None = {} if transport == "none" else None

    async def scenario() -> None:
        with sending(local=local) as outbox:
            reference = outbox.reference("echo", address)
            for _ in range(5):
                async with serving(address, local=local):
                    assert await reference.ask(Echo("hi"), Echoed, timeout_s=20) == Echoed("hi")
                    down = asyncio.ensure_future(reference.down())
                    await asyncio.sleep(0)
                await down

    run(scenario())


def test_one_reference_for_each_peer(folder: Path) -> None:
    outbox = Outbox("test")
    first = outbox.reference("echo", "inproc://a")
    assert outbox.reference("echo", "inproc://a") is first
    assert outbox.reference("echo", "inproc://b") is not first
    with pytest.raises(AddressError):
        outbox.reference("echo", "nowhere")


def test_an_ask_ends_at_its_deadline_and_the_late_answer_is_a_dead_letter(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        mailbox = Mailbox("echo", f"ipc://{folder}/echo", (Echo,))
        await mailbox.start()
        with sending() as outbox:
            reference = outbox.reference("echo", mailbox.address)
            reference.tell(Echo("told"))
            await mailbox.receive()  # so the connection stands, and the next ask is sent at once
            receiving = asyncio.ensure_future(mailbox.receive())
            with pytest.raises(AskTimeoutError, match=r"no answer .* within 0.2 s"):
                await reference.ask(Echo("late"), Echoed, timeout_s=0.2)
            answer(await receiving)
            ask = asyncio.ensure_future(reference.ask(Echo("next"), Echoed, timeout_s=20))
            answer(await mailbox.receive())
            assert await ask == Echoed("next")
            assert [letter.reason for letter in outbox.dead_letters.recent] == ["late_reply"]
        mailbox.close()

    run(scenario())


def test_each_ask_has_its_own_deadline(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        async with serving(f"ipc://{folder}/echo") as mailbox:
            with sending() as outbox:
                reference = outbox.reference("echo", mailbox.address)
                loop = asyncio.get_running_loop()

                async def wait(timeout_s: float) -> None:
                    began = loop.time()
                    with pytest.raises(AskTimeoutError):
                        await reference.ask(Silence(), Echoed, timeout_s=timeout_s)
                    assert loop.time() >= began + timeout_s

                far = asyncio.ensure_future(wait(3600))
                await asyncio.gather(*(wait(timeout_s) for timeout_s in (0.2, 0.05, 0.1, 0.0)))
                assert not far.done()
                far.cancel()
                assert await reference.ask(Echo("hi"), Echoed, timeout_s=20) == Echoed("hi")

    run(scenario())


def test_a_clock_that_is_set_meanwhile_changes_nothing(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        mailbox = Mailbox("echo", f"ipc://{folder}/echo", (Echo,))
        await mailbox.start()
        with sending() as outbox:
            reference = outbox.reference("echo", mailbox.address)
            asked = asyncio.ensure_future(reference.ask(Echo("hi"), Echoed, timeout_s=20))
            await asyncio.sleep(0)  # it is on its way
            monkeypatch.setattr(time, "time", lambda: time.clock_gettime(time.CLOCK_REALTIME) + 3600)
            delivery = await mailbox.receive()
            assert not delivery.expired
            answer(delivery)
            assert await asked == Echoed("hi")
        mailbox.close()

    run(scenario())


def test_an_ask_that_is_given_up_before_the_peer_comes_never_reaches_it(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        with sending() as outbox:
            reference = outbox.reference("echo", f"ipc://{folder}/echo")
            with pytest.raises(AskTimeoutError, match="no connection"):
                await reference.ask(Echo("early"), Echoed, timeout_s=0.05)
            asked = asyncio.ensure_future(reference.ask(Echo("in time"), Echoed, timeout_s=20))
            await asyncio.sleep(0)
            mailbox = Mailbox("echo", f"ipc://{folder}/echo", (Echo,))
            await mailbox.start()
            delivery = await mailbox.receive()
            assert delivery.message == Echo("in time")
            answer(delivery)
            assert await asked == Echoed("in time")
        mailbox.close()

    run(scenario())


def test_an_absent_peer_is_told_apart_from_a_silent_one(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        with sending() as outbox, pytest.raises(AskTimeoutError, match="no connection"):
            await outbox.reference("echo", f"ipc://{folder}/echo").ask(Echo("hi"), Echoed, timeout_s=0.1)

    run(scenario())


def test_the_queue_towards_a_peer_is_bounded(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        with sending("test", options=SocketOptions(high_water_mark=10)) as outbox:
            absent = outbox.reference("echo", f"ipc://{folder}/absent")
            for _ in range(20):
                absent.tell(Echo("hi"))
            with pytest.raises(MailboxFullError, match="queued"):
                absent.tell(Echo("hi"))

    run(scenario())


def test_the_way_to_a_mailbox_of_the_same_loop_is_bounded(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        local: dict[str, Mailbox] = {}
        options = SocketOptions(high_water_mark=10)
        async with serving(f"ipc://{folder}/echo", local=local, options=options) as mailbox:
            with sending("test", options=options, local=local) as outbox:
                reference = outbox.reference("echo", mailbox.address)
                for _ in range(20):
                    reference.tell(Echo("hi"))
                with pytest.raises(MailboxFullError, match="queued"):
                    reference.tell(Echo("hi"))
                await asyncio.sleep(0)  # they arrive, and there is room again
                assert await reference.ask(Echo("hi"), Echoed, timeout_s=20) == Echoed("hi")

    run(scenario())


def test_the_asks_outstanding_with_a_peer_are_bounded(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        mailbox = Mailbox("echo", f"ipc://{folder}/echo", (Echo,))
        await mailbox.start()
        with sending("test", options=SocketOptions(high_water_mark=10)) as outbox:
            reference = outbox.reference("echo", mailbox.address)
            asks = [asyncio.ensure_future(reference.ask(Echo(""), Echoed, timeout_s=20)) for _ in range(10)]
            arrived = [await mailbox.receive() for _ in asks]
            with pytest.raises(MailboxFullError, match="outstanding"):
                await reference.ask(Echo("hi"), Echoed, timeout_s=20)
            asks[0].cancel()
            await asyncio.wait(asks[:1])
            asks[0] = asyncio.ensure_future(reference.ask(Echo(""), Echoed, timeout_s=20))
            for delivery in [*arrived, await mailbox.receive()]:
                answer(delivery)
            assert await asyncio.gather(*asks) == [Echoed("")] * 10
        mailbox.close()

    run(scenario())


def test_an_answer_of_another_type_is_a_failure(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        async with serving(f"ipc://{folder}/echo") as mailbox:
            with sending() as outbox:
                reference = outbox.reference("echo", mailbox.address)
                with pytest.raises(RemoteError, match="Refusal") as caught:
                    await reference.ask(Echo("refuse"), Echoed, timeout_s=20)
                assert caught.value.code == "unknown_message"
                answer = await reference.ask(Echo("refuse"), Echoed, Refusal, timeout_s=20)
                assert answer == Refusal("as told")

    run(scenario())


def test_closing_ends_what_is_outstanding(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        async with serving(f"ipc://{folder}/echo") as mailbox:
            outbox = Outbox("test")
            reference = outbox.reference("echo", mailbox.address)
            silent = asyncio.ensure_future(reference.ask(Silence(), Echoed, timeout_s=20))
            down = asyncio.ensure_future(reference.down())
            await reference.ask(Echo("hi"), Echoed, timeout_s=20)
            outbox.close()
            for ended in (silent, down):
                with pytest.raises(UnreachableError, match="this side"):
                    await ended
            with pytest.raises(UnreachableError, match="is closed"):
                reference.tell(Echo("hi"))

    run(scenario())


@pytest.mark.parametrize("transport", ["inproc", "ipc", "none"])
def test_the_last_answer_arrives_though_the_mailbox_closes_behind_it(run: Run, folder: Path, transport: str) -> None:
    address = f"inproc://{folder}" if transport == "inproc" else f"ipc://{folder}/echo"
    local: dict[str, Mailbox] | None = {} if transport == "none" else None

    async def scenario() -> None:
        with sending(local=local) as outbox:
            reference = outbox.reference("echo", address)
            for _ in range(30):
                mailbox = Mailbox("echo", address, (Echo,), local=local)
                await mailbox.start()
                ask = asyncio.ensure_future(reference.ask(Echo("last"), Echoed, timeout_s=20))
                await asyncio.sleep(0)
                down = reference.down()
                answer(await mailbox.receive())
                mailbox.close()
                await down
                assert await ask == Echoed("last")

    run(scenario())


def test_closing_in_the_middle_of_a_handshake_blocks_nobody(run: Run, folder: Path) -> None:
    async def scenario() -> None:
        async with serving(f"ipc://{folder}/echo") as mailbox:
            for _ in range(300):
                hasty = Outbox("hasty")
                hasty.reference("echo", mailbox.address).tell(Echo("hi"))
                await asyncio.sleep(0)
                hasty.close()
            with sending() as outbox:
                reference = outbox.reference("echo", mailbox.address)
                assert await reference.ask(Echo("hi"), Echoed, timeout_s=20) == Echoed("hi")

    run(scenario())


@pytest.mark.parametrize("fault", ["other keys", "the public key alone", "no keys at all"])
def test_over_tcp_only_who_has_the_keys_gets_in(run: Run, fault: str) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"

    async def scenario() -> None:
        async with serving(address, options=WITH_KEYS) as mailbox:
            if fault == "other keys":
                with (
                    sending("test", options=WITH_OTHER_KEYS) as outbox,
                    pytest.raises(HandshakeRefusedError, match="other keys"),
                ):
                    await outbox.reference("echo", address).ask(Echo("hi"), Echoed, timeout_s=20)
            else:
                await knock(address, KEYS.public if fault == "the public key alone" else None)
            with sending("test", options=WITH_KEYS) as outbox:
                reference = outbox.reference("echo", address)
                assert await reference.ask(Echo("hi"), Echoed, timeout_s=20) == Echoed("hi")
            assert mailbox.dead_letters.count == 0

    run(scenario())


async def knock(address: str, server_key: bytes | None) -> None:
    """Send an ask from a bare socket, and return when ZMQ says that the connection came to nothing."""
    # On the loop, in the context of all: a thread that ZMQ blocks is ended by no limit of a test.
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    if server_key:
        socket.curve_serverkey, (socket.curve_publickey, socket.curve_secretkey) = server_key, zmq.curve_keypair()
    refused = AUTH if server_key else HUNG_UP | PROTOCOL
    events: asyncio.Queue[list[bytes]] = asyncio.Queue()
    monitor = Pump(socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | refused), events.put_nowait)
    try:
        socket.connect(address)
        socket.send(encode(Envelope("echo", "x", EnvelopeKind.ASK, 1, 0, 60.0, 0), Echo("hi"), 1 << 20))
        event, _ = struct.unpack("=Hi", (await events.get())[0])
        assert event & refused
    finally:
        socket.disable_monitor()
        monitor.close()
        socket.close(linger=0)


def test_a_connection_waits_for_keys_that_are_right_later(run: Run) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"

    async def scenario() -> None:
        with sending("test", options=WITH_KEYS) as outbox:
            reference = outbox.reference("echo", address)
            async with serving(address, options=WITH_OTHER_KEYS):
                with pytest.raises(HandshakeRefusedError):
                    await reference.ask(Echo("hi"), Echoed, timeout_s=20)
            while await taken(address):  # ZMQ's own thread closes the port
                pass
            async with serving(address, options=WITH_KEYS):
                assert await reference.ask(Echo("hi"), Echoed, timeout_s=20) == Echoed("hi")

    run(scenario())


async def taken(address: str) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", int(address.rpartition(":")[2]))
    except ConnectionRefusedError:
        return False
    except ConnectionResetError:  # taken by what is just being closed
        return True
    writer.close()
    return True


def test_without_its_gate_a_mailbox_lets_nobody_in(run: Run) -> None:
    address = f"tcp://127.0.0.1:{free_port()}"

    async def scenario() -> None:
        async with serving(address, options=WITH_KEYS) as mailbox:
            mailbox._close_authenticator()
            with sending("test", options=WITH_KEYS) as outbox, pytest.raises(UnreachableError):
                await outbox.reference("echo", address).ask(Echo("hi"), Echoed, timeout_s=20)

    run(scenario())
