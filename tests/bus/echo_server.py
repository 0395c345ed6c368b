"""Run by path as `echo_process.py ADDRESS PUBLIC SECRET`: says who answered; answers nothing to `Hold`."""

from __future__ import annotations

import os
import sys

import uvloop

from triptych.bus import CurveKeys, Mailbox, Message, SocketOptions


class Who(Message):
    pass


class Hold(Message):
    number: int


class Held(Message):
    pass


class Me(Message):
    pid: int


class Numbers(Message):
    held: tuple[int, ...]


async def main(address: str, keys: CurveKeys) -> None:
    mailbox = Mailbox("peer", address, (Who, Hold, Held), options=SocketOptions(curve=keys))
    await mailbox.start()
    print("ready", flush=True)
    held: list[int] = []
    while True:
        delivery = await mailbox.receive()
        match delivery.message:
            case Who():
                delivery.reply(Me(os.getpid()))
            case Hold(number):
                held.append(number)
            case Held():
                delivery.reply(Numbers(tuple(held)))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], CurveKeys(*(key.encode() for key in sys.argv[2:]))))
