"""A loop of each kind, with a bound on everything, and a raw peer that may send what it likes."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop
import zmq

from triptych.bus._pump import Pump

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]
_LIMIT_S = 30


@pytest.fixture(params=["stdlib", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run[Any]]:
    """Run a coroutine on a loop of that kind; more than `_LIMIT_S` seconds is a failure."""
    factory = asyncio.new_event_loop if request.param == "stdlib" else uvloop.new_event_loop

    async def bounded(coroutine: Coroutine[Any, Any, T]) -> T:
        async with asyncio.timeout(_LIMIT_S):
            return await coroutine

    with asyncio.Runner(loop_factory=factory) as runner:
        yield lambda coroutine: runner.run(bounded(coroutine))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short private folder: an ipc path has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="bus-") as name:
        yield Path(name)


class RawPeer:
    """A bare DEALER: sends any frames, and hands out what comes back."""

    def __init__(self, address: str) -> None:
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.connect(address)
        self._answers: asyncio.Queue[list[bytes]] = asyncio.Queue()
        self._pump = Pump(self._socket, self._answers.put_nowait)

    def send(self, *frames: bytes) -> None:
        self._pump.send(*frames)

    async def answer(self) -> list[bytes]:
        return await self._answers.get()

    def close(self) -> None:
        self._pump.close()


@pytest.fixture
def raw_peer() -> type[RawPeer]:
    return RawPeer
