"""Start a component twice in one way, and write what is seen as JSON: `... FILE WAY`."""

from __future__ import annotations

import asyncio
import signal
import sys
from typing import NamedTuple

import msgspec

from tests.actors.supervision.probe import Multiply, Ping, Pong, Product
from triptych.actors import AddressBook, load_topology
from triptych.actors.runtime import logs
from triptych.actors.supervision import PRELOAD
from triptych.actors.supervision._launcher import Launcher, thread_environment
from triptych.bus import Message, Outbox


class LaunchCase(NamedTuple):
    preload: tuple[str, ...]
    build: str = "tests.actors.supervision.probe:build"
    question: Message = Ping()
    answer: type[Message] = Pong
    on_gpu: tuple[str, ...] = ()


LAUNCH_CASES = {
    "fresh": LaunchCase(()),
    "forked": LaunchCase(("json",)),
    "cuda": LaunchCase(("json",), on_gpu=("encoder-0",)),
    "threaded": LaunchCase(("tests.actors.supervision.threaded_module",)),
    "missing": LaunchCase(("no_such_module",)),
    "roles": LaunchCase(PRELOAD, "tests.actors.supervision.tensor_probe:build", Multiply(512), Product),
}


async def main(file: str, way: LaunchCase) -> None:
    topology = load_topology(file)
    address_book, outbox = AddressBook(topology), Outbox("test")
    launcher = Launcher(preload=way.preload, environment=thread_environment({}, cores=2))
    launcher.open()
    seen = []
    for name in ("encoder-0", "denoiser-0"):
        arguments = (f"--topology={file}", f"--name={name}", f"--build={way.build}")
        process = await launcher.start(arguments, forked=True, on_gpu=name in way.on_gpu)
        answer = await outbox.reference(name, address_book.address(name)).ask(way.question, way.answer, timeout_s=60)
        process.signal(signal.SIGTERM)
        seen.append({"pid": process.pid, "answer": msgspec.structs.asdict(answer), "ending": str(await process.wait())})
    zygote = launcher.zygote_pid
    await launcher.close()
    outbox.close()
    print(msgspec.json.encode({"seen": seen, "zygote": zygote}).decode())


if __name__ == "__main__":
    logs.configure("test")
    asyncio.run(main(sys.argv[1], LAUNCH_CASES[sys.argv[2]]))
