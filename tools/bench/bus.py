"""Asks per second between two processes: a mailbox, bare ZMQ on the same loop, an actor, and an actor of xoscar.

A mailbox and bare ZMQ run over ipc. Xoscar runs over loopback tcp in clear, the only way that it has between two pools;
our actor runs over ipc and once more over tcp, where it is encrypted. All under uvloop.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import uvloop

from triptych.actors.supervision import module_command
from triptych.actors.topology import free_port
from triptych.bus import CurveKeys
from triptych.tools.bench.echo_servers import CLIENTS, PAYLOADS, Ask
from triptych.tools.bench.report import compare

_CASES: Final = ((1, "20 B"), (64, "20 B"), (1, "4 KiB"))  # asks in flight, and the text that goes and comes back
_SECONDS: Final = 0.5
_WARM_UP_S: Final = 0.2
_PEERS: Final = {"mailbox": "mailbox", "actor": "actor", "actor_tcp": "actor", "raw": "raw", "xoscar": "xoscar"}
_PAIRS: Final = (("mailbox", "raw"), ("actor", "xoscar"), ("actor_tcp", "xoscar"))

Rates = dict[tuple[str, int, str], list[float]]


def run(rounds: int) -> Iterable[dict[str, Any]]:
    """Yield one comparison for each pair of sides, number of asks in flight and payload."""
    keys = CurveKeys.new()
    with tempfile.TemporaryDirectory(prefix="bus-") as folder:
        addresses = _addresses(Path(folder))
        with _servers(addresses, keys):
            rates = uvloop.run(_measure_all(addresses, keys, rounds))
    for mine, theirs in _PAIRS:
        for in_flight, payload in _CASES:
            name, _, transport = mine.partition("_")
            yield compare(
                "bus",
                f"{name} over {transport or 'ipc'}, {payload}, {in_flight} in flight",
                "asks/s",
                ours=rates[mine, in_flight, payload],
                peer=theirs,
                peer_values=rates[theirs, in_flight, payload],
            )


async def _measure_all(addresses: dict[str, str], keys: CurveKeys, rounds: int) -> Rates:
    asks = {name: await CLIENTS[peer](addresses[name], keys) for name, peer in _PEERS.items()}
    for ask in asks.values():
        await _rate(ask, PAYLOADS["20 B"], 64, _WARM_UP_S)
    rates: Rates = defaultdict(list)
    order = list(asks)
    for _ in range(rounds):
        for in_flight, payload in _CASES:
            for name in order:
                rate = await _rate(asks[name], PAYLOADS[payload], in_flight, _SECONDS)
                rates[name, in_flight, payload].append(rate)
        order.append(order.pop(0))  # whoever follows a slow one has it warmer: take turns in that, too
    return rates


async def _rate(ask: Ask, text: str, in_flight: int, seconds: float) -> float:
    start = time.perf_counter()
    until = start + seconds

    async def worker() -> int:
        done = 0
        while time.perf_counter() < until:
            await ask(text)
            done += 1
        return done

    done = sum(await asyncio.gather(*(worker() for _ in range(in_flight))))
    return done / (time.perf_counter() - start)


@contextlib.contextmanager
def _servers(addresses: dict[str, str], keys: CurveKeys) -> Iterator[None]:
    started = {name: _start(peer, addresses[name], keys) for name, peer in _PEERS.items()}
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


def _start(peer: str, address: str, keys: CurveKeys) -> subprocess.Popen[str]:
    command = [*module_command("triptych.tools.bench.echo_servers"), peer, address]
    process = subprocess.Popen(  # noqa: S603  our own command
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    if process.stdin is not None:  # the secret is for the server alone: others can read its command line
        process.stdin.write(f"{keys.secret.decode()}\n")
        process.stdin.flush()
    return process


def _addresses(folder: Path) -> dict[str, str]:
    return {
        "mailbox": f"ipc://{folder}/mailbox",
        "raw": f"ipc://{folder}/raw",
        "actor": f"ipc://{folder}/actor",
        "actor_tcp": f"tcp://127.0.0.1:{free_port()}",
        "xoscar": f"127.0.0.1:{free_port()}",
    }
