"""Passes connections on, run by path on a host as `forward.py SOCKET PORT`: from a Unix socket to a port of loopback.

So a client that is on no host reaches what listens on loopback of one. It says "up", and ends with its stdin.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path


async def main(path: str, port: int) -> None:
    """Pass connections on until stdin ends."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", port)
        except OSError:  # nobody listens: the client sees that its connection is closed
            writer.close()
            return
        await asyncio.gather(_pass(reader, back), _pass(there, writer))

    async with await asyncio.start_unix_server(connected, path):
        print("up", flush=True)
        await asyncio.to_thread(sys.stdin.read)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):  # one side is gone, so the other is closed
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()


if __name__ == "__main__":
    Path(sys.argv[1]).unlink(missing_ok=True)
    asyncio.run(main(sys.argv[1], int(sys.argv[2])))
