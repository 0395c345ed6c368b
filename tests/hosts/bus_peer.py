"""One end of the bus: `bus_peer.py serve|ask ADDRESS PUBLIC SECRET HEARTBEAT_S`.

`serve` says its process id when its mailbox is open, and holds what it is asked to hold until it is asked who it is.
`ask` does what it is told by lines of stdin, and says what has come of it: "ask" and "hold" begin an ask, "watch" waits
for the peer to go down.
"""

from __future__ import annotations

import asyncio
import os
import sys

import uvloop

from triptych.bus import BusError, CurveKeys, Delivery, Mailbox, Message, Outbox, Reference, SocketOptions

TIMEOUT_S = 60.0


class Who(Message):
    pass


class Hold(Message):
    pass


class Me(Message):
    pid: int


async def serve(address: str, options: SocketOptions) -> None:
    mailbox = Mailbox("peer", address, (Who, Hold), options=options)
    await mailbox.start()
    print(os.getpid(), flush=True)
    held: list[Delivery] = []
    while True:
        delivery = await mailbox.receive()
        held.append(delivery)
        if isinstance(delivery.message, Who):
            for waiting in held:
                waiting.reply(Me(os.getpid()))
            held.clear()


async def ask(address: str, options: SocketOptions) -> None:
    outbox = Outbox("test", options=options)
    reference = outbox.reference("peer", address)
    lines = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    tasks = set()
    while line := await lines.readline():
        task = asyncio.create_task(_do(line.decode().strip(), reference))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    outbox.close()


async def _do(word: str, reference: Reference) -> None:
    try:
        if word == "watch":
            await reference.down()
            said = "down"
        else:
            answer = await reference.ask(Hold() if word == "hold" else Who(), Me, timeout_s=TIMEOUT_S)
            said = str(answer.pid)
    except BusError as error:
        said = type(error).__name__
    print(word, said, flush=True)


if __name__ == "__main__":
    mode, at, public, secret, heartbeat_s = sys.argv[1:]
    chosen = SocketOptions(curve=CurveKeys(public.encode(), secret.encode()), heartbeat_s=float(heartbeat_s))
    uvloop.run((serve if mode == "serve" else ask)(at, chosen))
