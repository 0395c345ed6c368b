"""Asks per second between two processes: ours, bare ZMQ on the same loop, and xoscar.

Ours and bare ZMQ run over ipc; xoscar over loopback tcp, the only way it has between two pools, and ours
once more over tcp beside it. All under uvloop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import uvloop

from triptych.actors.supervision.child_process import module_command
from triptych.tools.bench.echo_servers import CLIENTS, Ask
from triptych.tools.bench.report import compare

_IN_FLIGHT: Final = (1, 64)
_SECONDS: Final = 0.5
_WARM_UP_S: Final = 0.2
_PEERS: Final = {"ours": "ours", "ours_tcp": "ours", "raw": "raw", "xoscar": "xoscar"}
_PAIRS: Final = (("ours", "raw"), ("ours", "xoscar"), ("ours_tcp", "xoscar"))

Rates = dict[tuple[str, int], list[float]]


def run(rounds: int) -> Iterable[dict[str, Any]]:
    """Yield one comparison for each pair of sides and number of asks in flight."""
    with tempfile.TemporaryDirectory(prefix="bus-") as folder:
        addresses = _addresses(Path(folder))
        with _servers(addresses):
            rates = uvloop.run(_measure_all(addresses, rounds))
    for mine, theirs in _PAIRS:
        for count in _IN_FLIGHT:
            case = f"{'tcp' if mine == 'ours_tcp' else 'ipc'}, {count} in flight"
            yield compare(
                "bus",
                case,
                "asks/s",
                ours=rates[mine, count],
                peer=theirs,
                peer_values=rates[theirs, count],
            )


async def _measure_all(addresses: dict[str, str], rounds: int) -> Rates:
    asks = {name: await CLIENTS[peer](addresses[name]) for name, peer in _PEERS.items()}
    for ask in asks.values():
        await _rate(ask, 64, _WARM_UP_S)
    rates: Rates = defaultdict(list)
    order = list(asks)
    for _ in range(rounds):
        for count in _IN_FLIGHT:
            for name in order:
                rates[name, count].append(await _rate(asks[name], count, _SECONDS))
        order.append(order.pop(0))  # whoever follows a slow one has it warmer: take turns in that, too
    return rates


async def _rate(ask: Ask, in_flight: int, seconds: float) -> float:
    start = time.perf_counter()
    until = start + seconds

    async def worker() -> int:
        done = 0
        while time.perf_counter() < until:
            await ask()
            done += 1
        return done

    done = sum(await asyncio.gather(*(worker() for _ in range(in_flight))))
    return done / (time.perf_counter() - start)


@contextlib.contextmanager
def _servers(addresses: dict[str, str]) -> Iterator[None]:
    started = {name: _start(peer, addresses[name]) for name, peer in _PEERS.items()}
    try:
        for name, process in started.items():
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise RuntimeError(f"the server {name} did not start")
        yield
    finally:
        for process in started.values():
            process.terminate()
        for process in started.values():
            process.communicate()


def _start(peer: str, address: str) -> subprocess.Popen[str]:
    command = [*module_command("triptych.tools.bench.echo_servers"), peer, address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603  our own command


def _addresses(folder: Path) -> dict[str, str]:
    return {
        "ours": f"ipc://{folder}/ours",
        "raw": f"ipc://{folder}/raw",
        "ours_tcp": f"tcp://127.0.0.1:{_free_port()}",
        "xoscar": f"127.0.0.1:{_free_port()}",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
