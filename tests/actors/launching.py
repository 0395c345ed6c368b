"""Start a component twice in one way, and write what is seen as JSON: `... FILE WAY`."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import NamedTuple

import msgspec

from tests.actors.component import Multiply, Ping, Pong, Product
from triptych.actors import AddressBook, load_topology, logs
from triptych.actors.launcher import Launcher
from triptych.bus import Message, Outbox


class Way(NamedTuple):
    preload: tuple[str, ...]
    build: str = "tests.actors.component:build"
    question: Message = Ping()
    answer: type[Message] = Pong
    on_card: tuple[str, ...] = ()


WAYS = {
    "fresh": Way(()),
    "forked": Way(("json",)),
    "cuda": Way(("json",), on_card=("encoder-0",)),
    "threaded": Way(("tests.actors.threaded",)),
    "missing": Way(("no_such_module",)),
    "torch": Way(("torch", "diffusers", "transformers"), "tests.actors.tensors:build", Multiply(512), Product),
}


async def main(file: str, way: Way) -> None:
    topology = load_topology(file)
    book, outbox = AddressBook(topology), Outbox("test")
    launcher = Launcher(preload=way.preload, environment={"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"})
    launcher.open()
    seen = []
    for name in ("encoder-0", "denoiser-0"):
        arguments = (f"--topology={file}", f"--name={name}", f"--build={way.build}")
        process = await launcher.start(arguments, forked=True, on_card=name in way.on_card)
        answer = await outbox.reference(name, book.address(name)).ask(way.question, way.answer, timeout_s=60)
        process.signal(signal.SIGTERM)
        seen.append({"pid": process.pid, "answer": msgspec.structs.asdict(answer), "ending": str(await process.wait())})
    zygote = launcher.zygote_pid
    await launcher.close()
    outbox.close()
    print(msgspec.json.encode({"seen": seen, "zygote": zygote}).decode())


if __name__ == "__main__":
    logs.configure("test")
    asyncio.run(main(sys.argv[1], WAYS[sys.argv[2]]))
