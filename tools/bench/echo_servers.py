"""Echo servers and their clients: a mailbox, an actor, bare ZMQ, and an actor of xoscar.

`python -m triptych.tools.bench.echo_servers PEER ADDRESS` reads the secret half of a CURVE key pair from its standard
input and serves one of them until it is terminated.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import Awaitable, Callable
from typing import Final

import uvloop
import zmq

from triptych.actors import Actor, AddressBook, Incarnation
from triptych.actors.runtime.runtime import Runtime
from triptych.bus import CurveKeys, Mailbox, Message, Outbox, SocketOptions

NAME: Final = "echo"
PAYLOADS: Final = {"20 B": "a short text as such", "4 KiB": "x" * (4 << 10)}
Ask = Callable[[str], Awaitable[object]]
"""Send a text and wait until it is back."""


class Echo(Message):
    """A small typed message."""

    text: str
    """Any text."""
    number: int
    """Any number."""


class Echoed(Message):
    """The answer to `Echo`."""

    text: str
    """The text that was received."""
    number: int
    """The number that was received."""


class EchoActor(Actor):
    """Answers with what it receives."""

    async def echo(self, message: Echo) -> Echoed:
        """Return the text and the number."""
        return Echoed(message.text, message.number)


async def serve_actor(address: str, keys: CurveKeys) -> None:
    """Answer forever from a handler of an actor."""
    book = AddressBook(None, {NAME: address})
    book.socket_options = SocketOptions(curve=keys)
    async with Runtime([EchoActor(NAME)], Incarnation(book)) as runtime:
        _ready()
        await runtime.wait()


async def serve_mailbox(address: str, keys: CurveKeys) -> None:
    """Answer forever through a mailbox."""
    mailbox = Mailbox(NAME, address, (Echo,), options=SocketOptions(curve=keys))
    await mailbox.start()
    _ready()
    while True:
        delivery = await mailbox.receive()
        if isinstance(delivery.message, Echo):
            delivery.reply(Echoed(delivery.message.text, delivery.message.number))


async def connect_mailbox(address: str, keys: CurveKeys) -> Ask:
    """Return an ask that uses the envelope, typed decoding and a deadline."""
    reference = Outbox("bench", options=SocketOptions(curve=keys)).reference(NAME, address)

    async def ask(text: str) -> object:
        return await reference.ask(Echo(text, 12345), Echoed, timeout_s=30)

    return ask


class RawPump:
    """The least that a ZMQ socket on an event loop can do: frames in, frames out."""

    def __init__(self, socket: zmq.Socket[bytes], arrived: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._arrived = arrived
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(int(socket.getsockopt(zmq.FD)), self._drain)
        self._again = True
        self._loop.call_soon(self._drain)

    def send(self, frames: list[bytes]) -> None:
        """Send, then read what has arrived meanwhile."""
        self._socket.send_multipart(frames, zmq.NOBLOCK)
        if not self._again:
            self._again = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._again = False
        with contextlib.suppress(zmq.Again):
            while True:
                self._arrived(self._socket.recv_multipart(zmq.NOBLOCK))


async def serve_raw(address: str, _keys: CurveKeys) -> None:
    """Answer forever with the bytes that are received."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    socket.bind(address)
    pump = RawPump(socket, lambda frames: pump.send(frames))
    _ready()
    await asyncio.get_running_loop().create_future()


async def connect_raw(address: str, _keys: CurveKeys) -> Ask:
    """Return an ask that sends a number, by which answers are matched, and a payload."""
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    socket.connect(address)
    waiting: dict[bytes, asyncio.Future[bytes]] = {}
    numbers = itertools.count()
    pump = RawPump(socket, lambda frames: waiting.pop(frames[0]).set_result(frames[1]))
    loop = asyncio.get_running_loop()

    async def ask(text: str) -> object:
        number = next(numbers).to_bytes(8, "big")
        answer = waiting[number] = loop.create_future()
        pump.send([number, text.encode()])
        return await answer

    return ask


async def serve_xoscar(address: str, _keys: CurveKeys) -> None:
    """Answer forever from an actor in a pool of its own."""
    import xoscar

    class XoscarEchoActor(xoscar.Actor):  # type: ignore[misc]
        async def echo(self, text: str, number: int) -> tuple[str, int]:
            return text, number

    pool = await xoscar.create_actor_pool(address, n_process=0)
    await xoscar.create_actor(XoscarEchoActor, address=pool.external_address, uid=NAME)
    _ready()
    await pool.join()


async def connect_xoscar(address: str, _keys: CurveKeys) -> Ask:
    """Return a call of the actor's method."""
    import xoscar

    reference = await xoscar.actor_ref(address=address, uid=NAME)

    async def ask(text: str) -> object:
        answer: object = await reference.echo(text, 12345)
        return answer

    return ask


SERVERS = {"mailbox": serve_mailbox, "actor": serve_actor, "raw": serve_raw, "xoscar": serve_xoscar}
CLIENTS = {"mailbox": connect_mailbox, "actor": connect_mailbox, "raw": connect_raw, "xoscar": connect_xoscar}


def _ready() -> None:
    print("ready", flush=True)


if __name__ == "__main__":
    uvloop.run(SERVERS[sys.argv[1]](sys.argv[2], CurveKeys.of(sys.stdin.readline().strip())))
