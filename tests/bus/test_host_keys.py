"""Several hosts, each with a key pair of its own; addresses of the loopback network stand for them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from triptych.bus import (
    AddressError,
    CurveKeys,
    HandshakeRefusedError,
    HostKey,
    Mailbox,
    Message,
    Outbox,
    Reference,
    SocketOptions,
    UnreachableError,
)

Run = Callable[..., Any]
ADDRESSES = {"a": "127.0.0.1", "b": "127.0.0.2", "c": "127.0.0.3"}
KEYS = {name: CurveKeys.new() for name in (*ADDRESSES, "former b")}


class Who(Message):
    pass


class Me(Message):
    host: str


def hosts(*names: str, **other_keys: str) -> tuple[HostKey, ...]:
    """Return the entries of these hosts; `b="former b"` lists another key for b."""
    return tuple(HostKey(name, ADDRESSES[name], KEYS[other_keys.get(name, name)].public) for name in names)


def options(host: str, listed: tuple[HostKey, ...], **more: Any) -> SocketOptions:
    return SocketOptions(curve=KEYS[host], hosts=listed, **more)


def free_address(host: str) -> str:
    with socket.create_server((ADDRESSES[host], 0)) as probe:
        return f"tcp://{ADDRESSES[host]}:{probe.getsockname()[1]}"


@contextlib.asynccontextmanager
async def serving(address: str, host: str, listed: tuple[HostKey, ...], **more: Any) -> AsyncIterator[Mailbox]:
    mailbox = Mailbox("who", address, (Who,), options=options(host, listed, **more))
    while True:
        try:
            await mailbox.start()
            break
        except AddressError:  # ZMQ's own thread has not closed the port of the mailbox before
            await asyncio.sleep(0.01)

    async def answer() -> None:
        while True:
            (await mailbox.receive()).reply(Me(host))

    task = asyncio.create_task(answer())
    try:
        yield mailbox
    finally:
        task.cancel()
        mailbox.close()


@contextlib.contextmanager
def asking(address: str, host: str, listed: tuple[HostKey, ...], **more: Any) -> Iterator[Reference]:
    outbox = Outbox("test", options=options(host, listed, **more))
    try:
        yield outbox.reference("who", address)
    finally:
        outbox.close()


async def ask(reference: Reference, timeout_s: float = 20.0) -> str:
    return (await reference.ask(Who(), Me, timeout_s=timeout_s)).host


def test_each_host_asks_each_with_the_key_of_its_own(run: Run) -> None:
    listed = hosts("a", "b", "c")
    places = {name: free_address(name) for name in ADDRESSES}

    async def scenario() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for name, address in places.items():
                await stack.enter_async_context(serving(address, name, listed))
            for asker in places:
                for asked, address in places.items():
                    with asking(address, asker, listed) as reference:
                        assert await ask(reference) == asked

    run(scenario())


def test_a_key_that_is_not_listed_is_refused_by_name_and_gets_in_when_it_is_listed(run: Run) -> None:
    """Also b asks on until then: each ask waits for the next try, or says why there is none yet."""
    address = free_address("a")
    everyone = hosts("a", "b", "c")

    async def scenario() -> None:
        with asking(address, "b", everyone) as b, asking(address, "c", everyone) as c:
            async with serving(address, "a", hosts("a", "c")):
                for _ in range(3):
                    with pytest.raises(HandshakeRefusedError) as refused:
                        await ask(b)
                    said = str(refused.value)
                    assert "host a refuses the key of host b" in said
                    assert f"list public_key = '{KEYS['b'].public.decode()}' for b there" in said
                with pytest.raises(HandshakeRefusedError, match="refuses the key"):
                    await ask(b, timeout_s=0.0)  # in the pause before the next try
                assert await ask(c) == "a"
            async with serving(address, "a", everyone):
                while True:
                    try:
                        assert await ask(b) == "a"
                        break
                    except UnreachableError:  # the mailbox before may still have been closing
                        continue

    run(scenario())


def test_a_key_that_is_taken_out_is_refused_from_the_next_start_on(run: Run) -> None:
    address = free_address("a")

    async def scenario() -> None:
        with asking(address, "b", hosts("a", "b")) as b:
            async with serving(address, "a", hosts("a", "b")):
                assert await ask(b) == "a"
            async with serving(address, "a", hosts("a", b="former b")):
                while True:
                    with pytest.raises(UnreachableError) as error:
                        await ask(b)
                    if isinstance(error.value, HandshakeRefusedError):  # else the connection before was lost
                        break

    run(scenario())


def test_a_host_that_has_another_key_than_the_listed_one_is_not_asked(run: Run) -> None:
    address = free_address("b")

    async def scenario() -> None:
        async with serving(address, "b", hosts("a", "b")) as mailbox:
            with asking(address, "a", hosts("a", "b", b="former b")) as reference:
                down = asyncio.ensure_future(reference.down())
                with pytest.raises(HandshakeRefusedError, match="host b does not have the key that is listed for it"):
                    await ask(reference)
                await down
            assert mailbox.dead_letters.count == 0

    run(scenario())


def test_an_address_of_no_host_is_refused(run: Run) -> None:
    async def scenario() -> None:
        with (
            asking(free_address("c"), "a", hosts("a", "b")) as reference,
            pytest.raises(AddressError, match="is at no host of this system"),
        ):
            await ask(reference)

    run(scenario())


def test_mailboxes_of_one_process_accept_different_hosts(run: Run) -> None:
    """ZMQ has one authenticator for all of them, and asks it about each by its domain."""
    places = [free_address("a") for _ in range(2)]

    async def scenario() -> None:
        async with serving(places[0], "a", hosts("a", "b")):
            async with serving(places[1], "a", hosts("a", "c")):
                for asker, let_in, refused in (("b", *places), ("c", *places[::-1])):
                    with asking(let_in, asker, hosts("a", "b", "c")) as reference:
                        assert await ask(reference) == "a"
                    with (
                        asking(refused, asker, hosts("a", "b", "c")) as reference,
                        pytest.raises(HandshakeRefusedError, match=f"refuses the key of host {asker}"),
                    ):
                        await ask(reference)
            with asking(places[0], "b", hosts("a", "b")) as reference:
                assert await ask(reference) == "a"

    run(scenario())


def test_a_host_that_falls_silent_is_lost_after_three_heartbeats(run: Run) -> None:
    """Its connection stays open, as if its machine had lost power: a relay passes nothing on any more."""
    listed, address = hosts("a", "b"), free_address("a")

    async def scenario() -> None:
        async with serving(address, "a", listed, heartbeat_s=0.2), relay(address) as (relayed, silence):
            with asking(relayed, "b", listed, heartbeat_s=0.2) as reference:
                assert await ask(reference) == "a"
                down = asyncio.ensure_future(reference.down())
                silence()
                with pytest.raises(UnreachableError, match="was lost"):
                    await ask(reference)
                await down

    run(scenario())


@contextlib.asynccontextmanager
async def relay(to: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """Pass bytes on to an address of the same host, until the function is called."""
    silent = False
    host, port = to.removeprefix("tcp://").split(":")
    writers: list[asyncio.StreamWriter] = []
    tasks: list[asyncio.Task[None]] = []

    async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        while data := await source.read(1 << 16):
            if not silent:
                target.write(data)

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(host, int(port))
        writers.extend((writer, there[1]))
        tasks.extend((asyncio.create_task(copy(reader, there[1])), asyncio.create_task(copy(there[0], writer))))

    def fall_silent() -> None:
        nonlocal silent
        silent = True

    server = await asyncio.start_server(connected, host, 0)
    try:
        yield f"tcp://{host}:{server.sockets[0].getsockname()[1]}", fall_silent
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        for writer in writers:
            writer.close()


def test_a_host_that_moves_is_found_at_its_new_address_while_its_peer_waits(run: Run) -> None:
    """The addresses stand for nodes, and the name of the host for whichever it is on."""
    port = free_address("b").rpartition(":")[2]
    by_name = (*hosts("a"), HostKey("b", "host-b", KEYS["b"].public))
    nodes = {"host-b": ADDRESSES["c"]}

    async def scenario() -> None:
        with asking(f"tcp://host-b:{port}", "a", by_name, locate=nodes.__getitem__) as peer:
            asked = asyncio.ensure_future(ask(peer))
            async with serving(f"tcp://{ADDRESSES['b']}:{port}", "b", by_name):
                nodes["host-b"] = ADDRESSES["b"]
                assert await asked == "b"
                down = peer.down()
            await down
            nodes["host-b"] = ADDRESSES["c"]
            async with serving(f"tcp://{ADDRESSES['c']}:{port}", "b", by_name):
                assert await ask(peer) == "b"

    run(scenario())
