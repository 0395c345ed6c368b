"""A process with an arena and a backend, driven by JSON lines: what a pool is to another pool.

Started as `python transfer_peer.py NBYTES KEYWORDS`; it prints where it is, then one answer for each request, in the
order in which they end: {"id", "do", ...} -> {"id", "value"} or {"id", "error", ...}.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from typing import Any

from triptych.engines.codec.checksum import checksum
from triptych.engines.memory.arena import Arena
from triptych.engines.transfer import PullExecutor, TransferError, open_backend


class Peer:
    def __init__(self, arena: Arena, settings: dict[str, Any]) -> None:
        self.arena = arena
        self.backend = open_backend(arena=arena, **settings)
        self.transfers = PullExecutor(self.backend)

    async def fill(self, offset: int, nbytes: int, byte: int) -> int:
        # Every byte depends on its place, so that bytes which land in the wrong place are seen.
        pattern = (memoryview(bytes((byte + i) % 251 for i in range(251))) if nbytes else memoryview(b"")).tobytes()
        self.arena.view(offset, nbytes)[:] = (pattern * (nbytes // 251 + 1))[:nbytes]
        return checksum(self.arena.view(offset, nbytes))

    async def checksum(self, offset: int, nbytes: int) -> int:
        return checksum(self.arena.view(offset, nbytes))

    async def pull(self, **request: Any) -> None:
        await self.transfers.pull(**request)

    async def pull_once(self, **request: Any) -> None:
        await asyncio.to_thread(self.backend.pull, **request)

    async def held(self) -> list[tuple[int, int]]:
        return list(self.transfers.held())

    async def describe(self) -> str:
        return self.backend.describe()

    async def exposed(self) -> str:
        return self.backend.exposed()

    async def close(self) -> None:
        await asyncio.to_thread(self.backend.close)


async def answer(peer: Peer, request: dict[str, Any]) -> None:
    reply: dict[str, Any] = {"id": request.pop("id")}
    try:
        reply["value"] = await getattr(peer, request.pop("do"))(**request)
    except TransferError as error:
        reply |= {"error": error.reason, "retryable": error.retryable, "quarantine": error.quarantine}
    except ValueError as error:
        reply |= {"error": str(error)}
    print(json.dumps(reply), flush=True)


async def main() -> None:
    arena = Arena.create(int(sys.argv[1]))
    peer = Peer(arena, json.loads(sys.argv[2]))
    loop = asyncio.get_running_loop()
    requests: asyncio.Queue[str] = asyncio.Queue()

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(requests.put_nowait, line)
        loop.call_soon_threadsafe(requests.put_nowait, "")

    threading.Thread(target=read, daemon=True).start()
    print(json.dumps({"session": peer.backend.session, "base": peer.backend.base}), flush=True)
    tasks = set()
    while line := await requests.get():
        task = asyncio.create_task(answer(peer, json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    asyncio.run(main())
