"""Measure hops of tensors between two pools, against the copies that every hop needs.

Shared memory is measured against two plain copies, Mooncake against its own blocking read as its documentation uses it.
Both sides of a case take turns, in processes of their own where bytes travel; a value is the median of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple, TextIO, cast

from triptych.actors.supervision import module_command
from triptych.tools.bench.report import compare

SIZES = {"4 KiB": 4 << 10, "1 MiB": 1 << 20, "64 MiB": 64 << 20}
ARENA = 128 << 20
TIMEOUT_S = 60.0
REPETITIONS = 5

Timed = Callable[[], float]


def run(rounds: int) -> Iterable[dict[str, object]]:
    """Measure all cases, `rounds` times each, and yield a row for each of them; times in ms, ratio = peer / ours."""
    yield from _shm(rounds)
    yield from compare_pulls("transfer", rounds, Place(), Place())


def _row(case: str, peer: str, ours: list[float], theirs: list[float]) -> dict[str, object]:
    return compare("transfer", case, "ms", ours=ours, peer=peer, peer_values=theirs, higher_is_better=False)


def _interleaved(rounds: int, *sides: Timed) -> list[list[float]]:
    """Run the sides in turn, last side first in every other round.

    Returns milliseconds, the median of a few repetitions, for each side and round.
    """
    taken: list[list[float]] = [[] for _ in sides]
    order = list(zip(sides, taken, strict=True))
    for number in range(rounds + 1):
        order.reverse()
        for side, times in order:
            value = median(side() for _ in range(REPETITIONS)) * 1e3
            # The first round warms up.
            if number:
                times.append(value)
    return taken


def _shm(rounds: int) -> Iterator[dict[str, object]]:
    # New memory comes in pages of 2 MiB then, for both sides; by 4 KiB it costs more than all copies together.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    import torch

    # One thread each, so that a copy is a copy on both sides.
    torch.set_num_threads(1)
    with asyncio.Runner() as runner:
        for label, nbytes in SIZES.items():
            hop = _ShmHop(nbytes, runner)
            ours, warm, fresh = _interleaved(rounds, hop.ours, hop.two_copies, hop.two_copies_into_new_memory)
            yield _row(f"shm hop {label}", "two memcpys, the second into new memory", ours, fresh)
            yield _row(f"shm hop {label}", "two memcpys between warm buffers", ours, warm)
            hop.close()


class _ShmHop:
    """Store on one stream; map, verify and load on another. The block is mapped twice, as two roles map it."""

    def __init__(self, nbytes: int, runner: asyncio.Runner) -> None:
        import torch

        from triptych.engines.memory.arena import Arena
        from triptych.tools.transfer_pair import TransferPair

        self.nbytes = nbytes
        self.runner = runner
        self.pair = TransferPair(torch.device("cpu"), ARENA)
        self.arena = self.pair.arena
        self.mapped = Arena.attach(self.arena.address)
        self.source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8)
        self.warm = torch.zeros_like(self.source)

    def ours(self) -> float:
        return self.runner.run(self._hop())

    async def _hop(self) -> float:
        from triptych.engines.codec.codec import pack

        start = time.perf_counter()
        packed = pack({"latents": self.source})
        checksum = await self.pair.sender.store(packed, self.arena.tensor(0, packed.nbytes))
        loaded = await self.pair.receiver.load(packed.manifest, self.mapped.tensor(0, packed.nbytes), checksum)
        self.pair.receiver.wait(loaded.event, loaded.values)
        return time.perf_counter() - start

    def two_copies(self) -> float:
        start = time.perf_counter()
        ctypes.memmove(self.arena.base, self.source.data_ptr(), self.nbytes)
        ctypes.memmove(self.warm.data_ptr(), self.mapped.base, self.nbytes)
        return time.perf_counter() - start

    def two_copies_into_new_memory(self) -> float:
        import torch

        start = time.perf_counter()
        ctypes.memmove(self.arena.base, self.source.data_ptr(), self.nbytes)
        fresh = torch.empty_like(self.source)
        ctypes.memmove(fresh.data_ptr(), self.mapped.base, self.nbytes)
        return time.perf_counter() - start

    def close(self) -> None:
        self.mapped.close()
        self.pair.close()


class Place(NamedTuple):
    """Where a process of a pair runs."""

    address: str = "127.0.0.1"
    """By which the other reaches it."""
    popen: Callable[..., subprocess.Popen[str]] = subprocess.Popen


def compare_pulls(bench: str, rounds: int, server: Place, client: Place) -> Iterator[dict[str, object]]:
    """Compare pulls of a pool from another with what Mooncake takes, in its way and with its own settings."""
    from triptych.engines.transfer.mooncake_setup import environment

    settings = environment("tcp", {})
    plain = {"MC_FORCE_TCP": "1", "MC_LOG_LEVEL": "ERROR"}
    places = (server, client)
    with (
        _pair("ours", settings, *places) as ours,
        _pair("raw", settings, *places) as same,
        _pair("raw", plain, *places) as raw,
    ):
        for label, nbytes in SIZES.items():
            sides = [partial(pair, nbytes) for pair in (ours, same, raw)]
            mine, with_ours, with_defaults = _interleaved(rounds, *sides)
            for name, theirs in {"our settings": with_ours, "its defaults": with_defaults}.items():
                yield compare(
                    bench,
                    f"mooncake pull {label}",
                    "ms",
                    ours=mine,
                    peer=f"transfer_sync_read with {name}",
                    peer_values=theirs,
                    higher_is_better=False,
                )


@contextmanager
def _pair(kind: str, settings: dict[str, str], serving: Place, pulling: Place) -> Iterator[Callable[[int], float]]:
    """Start a process that serves an arena and one that pulls from it; the result pulls and returns the seconds."""
    with _process(kind, settings, serving, "serve") as server:
        session, address = server.readline().split()
        with _process(kind, settings, pulling, "pull", session, address) as client:

            def pull(nbytes: int) -> float:
                client.write(f"{nbytes}\n")
                return float(client.readline())

            yield pull


class _Process:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._in, self._out = cast("TextIO", process.stdin), cast("TextIO", process.stdout)

    def readline(self) -> str:
        line = self._out.readline()
        if not line:
            raise RuntimeError(f"a process of the bench ended with code {self.process.wait()}")
        return line

    def write(self, text: str) -> None:
        self._in.write(text)
        self._in.flush()


@contextmanager
def _process(kind: str, settings: dict[str, str], place: Place, *arguments: str) -> Iterator[_Process]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("MC_")}
    command = [*module_command("triptych.tools.bench.transfer"), "--hostname", place.address, kind, *arguments]
    with place.popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environ | settings
    ) as process:
        try:
            yield _Process(process)
        finally:
            process.kill()


def _ours(arguments: argparse.Namespace) -> None:
    from triptych.engines.memory.arena import Arena
    from triptych.engines.transfer import PullExecutor, open_backend

    arena = Arena.create(ARENA)
    backend = open_backend("mooncake", arena=arena, hostname=arguments.hostname)
    if arguments.mode == "serve":
        _serve(backend.session, backend.base)
        return
    transfers = PullExecutor(backend)

    async def pull(nbytes: int) -> float:
        start = time.perf_counter()
        await transfers.pull(arguments.session, arguments.address, 0, nbytes, TIMEOUT_S)
        return time.perf_counter() - start

    with asyncio.Runner() as runner:
        for line in sys.stdin:
            print(runner.run(pull(int(line))), flush=True)


def _raw(arguments: argparse.Namespace) -> None:
    from mooncake.engine import TransferEngine

    from triptych.engines.memory.arena import Arena

    arena = Arena.create(ARENA)
    engine: Any = TransferEngine()
    if engine.initialize(arguments.hostname, "P2PHANDSHAKE", "tcp", "") or engine.register_memory(arena.base, ARENA):
        raise RuntimeError("Mooncake cannot start")
    if arguments.mode == "serve":
        _serve(f"{arguments.hostname}:{engine.get_rpc_port()}", arena.base)
        return
    for line in sys.stdin:
        start = time.perf_counter()
        code = engine.transfer_sync_read(arguments.session, arena.base, arguments.address, int(line))
        taken = time.perf_counter() - start
        if code:
            raise RuntimeError("Mooncake did not transfer")
        print(taken, flush=True)


def _serve(session: str, base: int) -> None:
    print(session, base, flush=True)
    sys.stdin.read()


def _main() -> None:
    parser = argparse.ArgumentParser(description="One process of the mooncake cases.")
    parser.add_argument("--hostname", default="127.0.0.1")
    parser.add_argument("kind", choices=["ours", "raw"])
    parser.add_argument("mode", choices=["serve", "pull"])
    parser.add_argument("session", nargs="?", default="")
    parser.add_argument("address", nargs="?", type=int, default=0)
    arguments = parser.parse_args()
    (_ours if arguments.kind == "ours" else _raw)(arguments)


if __name__ == "__main__":
    _main()
