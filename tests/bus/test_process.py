"""A real peer in a real process, killed without a word."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from triptych.bus import CurveKeys, Message, Outbox, Reference, SocketOptions, UnreachableError

PROGRAM = Path(__file__).with_name("echo_server.py")
KEYS = CurveKeys(*zmq.curve_keypair())


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


@pytest.fixture(params=["ipc", "tcp"])
def address(request: pytest.FixtureRequest, folder: Path) -> str:
    if request.param == "ipc":
        return f"ipc://{folder}/peer"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a peer and return when its mailbox is open."""
    started: list[subprocess.Popen[str]] = []

    def start_peer(address: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM), address, *(key.decode() for key in (KEYS.public, KEYS.secret))],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield start_peer
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


async def held_by(reference: Reference) -> tuple[int, ...]:
    return (await reference.ask(Held(), Numbers, timeout_s=20)).held


def test_a_killed_peer_is_seen_and_its_successor_reached(
    run: Callable[..., Any], address: str, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    async def scenario() -> None:
        first = start(address)
        outbox = Outbox("test", options=SocketOptions(curve=KEYS))
        reference = outbox.reference("peer", address)
        assert await reference.ask(Who(), Me, timeout_s=20) == Me(first.pid)
        down = asyncio.ensure_future(reference.down())
        holds = [asyncio.ensure_future(reference.ask(Hold(n), Me, timeout_s=60)) for n in range(3)]
        await asyncio.sleep(0)
        assert await held_by(reference) == (0, 1, 2)
        first.kill()
        await down
        for hold in holds:
            with pytest.raises(UnreachableError, match="lost"):
                await hold

        reference.tell(Hold(3))  # to whoever comes next
        asked = asyncio.ensure_future(reference.ask(Who(), Me, timeout_s=20))
        await asyncio.sleep(0)
        second = await asyncio.to_thread(start, address)
        assert await asked == Me(second.pid)
        assert await held_by(reference) == (3,)  # nothing that was meant for the first
        outbox.close()

    run(scenario())


def test_what_was_queued_for_a_stopped_peer_does_not_reach_its_successor(
    run: Callable[..., Any], address: str, start: Callable[[str], subprocess.Popen[str]]
) -> None:
    async def scenario() -> None:
        first = start(address)
        outbox = Outbox("test", options=SocketOptions(curve=KEYS))
        reference = outbox.reference("peer", address)
        assert await reference.ask(Who(), Me, timeout_s=20) == Me(first.pid)
        down = asyncio.ensure_future(reference.down())
        first.send_signal(signal.SIGSTOP)
        asked = asyncio.ensure_future(reference.ask(Hold(1), Me, timeout_s=60))
        reference.tell(Hold(2))
        await asyncio.sleep(0)
        first.kill()
        await down
        with pytest.raises(UnreachableError):
            await asked
        second = await asyncio.to_thread(start, address)
        assert await reference.ask(Who(), Me, timeout_s=20) == Me(second.pid)
        assert await held_by(reference) == ()
        outbox.close()

    run(scenario())
