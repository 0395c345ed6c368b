"""What a stranger, and a peer with wrong values, can do to the head: nothing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.messages import bodies_of
from tests.ports import free_ports
from tests.roles.test_head import finished, play, playing, topology
from triptych.actors import Actor, AddressBook, Topology
from triptych.actors.runtime import Runtime
from triptych.actors.system import Inspect, Shutdown
from triptych.bus import Envelope, Kind, Message, Outbox, Reference, RemoteFailure
from triptych.bus.wire import BadBodyError, BodyDecoder, encode
from triptych.engines.parameters import Signature
from triptych.roles.head import Head
from triptych.roles.instance import Instance
from triptych.roles.messages import device, requests, stages
from triptych.roles.messages import pool as pools
from triptych.roles.messages.stages import Acknowledged
from triptych.roles.messages.work import Work
from triptych.roles.pool import BufferPool
from triptych.roles.pool import build as build_pool
from triptych.roles.workspace import Premises

__all__ = ["topology"]  # the fixture

WORDS = ("r", "r/0", "r/1", "encoder-0", "denoiser-0", "decoder-0", "encoder", "denoiser", "pool", "prompt", "png", "")
"""What names a thing in the tests below, so that not every message is about nothing."""
SETTINGS = settings(
    max_examples=150,
    deadline=None,
    phases=[Phase.generate],  # an actor that has ended cannot be asked for a smaller example
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


CANCEL = stages.StageCancel(Work("", 0), "")
_numbers = itertools.count(1 << 32)


class Stream(Actor):
    """Takes what an instance tells its stream worker, and does nothing."""

    async def take(self, message: device.RunPanel | device.CancelPanel | device.TurnWeights) -> None:
        pass


class Transfer(Actor):
    """Takes what an instance tells its transfer actor, and does nothing."""

    async def take(self, message: device.StageState | device.LoadState | device.CancelState) -> None:
        pass


@pytest.fixture
def actors(topology: Callable[..., Topology]) -> Callable[[str], AbstractAsyncContextManager[Any]]:
    """Run the real head, pool or encoder-0 of a topology, the first with a request under way."""

    @asynccontextmanager
    async def head() -> AsyncIterator[Any]:
        async with playing(topology()) as stage:
            for name in stage.workers:
                await stage.hello(name)
            await stage.submit(n=2)
            yield stage.head

    @asynccontextmanager
    async def other(name: str) -> AsyncIterator[Any]:
        place = topology()
        book, outbox, premises = AddressBook(place), Outbox("test"), Premises()
        component = place.component(name)
        if name == "pool":
            inside: list[Actor] = build_pool(component, place)
        else:
            inside = [Instance(component, place, premises), Stream(f"{name}.stream"), Transfer(f"{name}.transfer")]
            premises.model_loaded(Signature(), 1)
            premises.model_found("model", "cpu")
            premises.pool_mapped()
        async with Runtime(inside, book=book, generation=1):
            yield outbox.reference(name, book.address(name))
            outbox.close()

    return lambda name: head() if name == "head" else other(name)


@pytest.mark.parametrize(
    ("name", "messages", "last"),
    [
        ("head", tuple(Head.handlers), stages.StageProgress(Work("", 0), 0, 0)),
        ("pool", tuple(BufferPool.handlers), pools.PoolQuery()),
        # What its own process tells it is not told by others: there, a surprise is a defect, and ends it.
        ("encoder-0", tuple(m for m in Instance.handlers if m.__module__ != device.__name__), CANCEL),
    ],
)
def test_no_message_that_can_be_decoded_ends_an_actor(
    actors: Callable[[str], AbstractAsyncContextManager[Any]],
    name: str,
    messages: tuple[type[Message], ...],
    last: Message,
) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        actor = actors(name)
        reference = runner.run(actor.__aenter__())

        async def survives(bodies: list[bytes]) -> None:
            for body in bodies:
                send(reference, body)
            with contextlib.suppress(RemoteFailure):  # that it is told, and never asked: the actor's own answer
                await reference.ask(last, Acknowledged, pools.PoolDescription, timeout_s=20)

        @SETTINGS
        @given(st.lists(bodies_of(messages, WORDS), max_size=5))
        def check(bodies: list[bytes]) -> None:
            runner.run(survives(bodies))

        check()
        runner.run(actor.__aexit__(None, None, None))  # raises what an actor crashed with


LEASE = ("pool", 1, 1, 0, 64)


@pytest.mark.parametrize(
    "fields",
    [
        ("StageStarted", ("r/0", 1), "denoiser-0", "bogus"),
        ("TransferStaged", ("r/0", 1), "denoiser-0", "bogus", (LEASE, b"", 0, 64), 0.1, 3),
        ("TransferStaged", ("r/0", 1), "denoiser-0", "denoiser", (("pool", 1, 1, -1, 64), b"", 0, 64), 0.1, 3),
        ("StageFinished", ("r/0", 1), "decoder-0", "decoder", ("r_0.png", "image/png", -1), 0.1, 3),
        ("StageProgress", ("r/0", 1), -1, 3),
        ("SubmitRequest", "r", {"prompt": "x"}, 2**64 - 1, 2),
        ("WaitRequest", "r", float("nan")),
        ("CancelRequest", "x" * 129),
        ("InstanceAlive", "encoder-0", 2**62),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_the_decoder(fields: tuple[object, ...]) -> None:
    with pytest.raises(BadBodyError, match="invalid_message"):
        BodyDecoder(tuple(Head.handlers)).decode(memoryview(msgspec.msgpack.encode(fields)))


def send(reference: Reference, body: bytes) -> None:
    """Ask for nothing that is waited for: the answer is a dead letter of the outbox."""
    envelope = Envelope(reference.name, "test", Kind.ASK, next(_numbers), 0, 60.0, 0, "")
    head = msgspec.msgpack.encode(envelope)
    reference._connected().send(envelope.message_id, len(head).to_bytes(2, "big") + head + body)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_host_changes_nothing_over_tcp_and_learns_nothing(
    topology: Callable[..., Topology],
) -> None:
    def forged(sender: str, generation: int, message: Any) -> str:
        envelope = Envelope("head", sender, Kind.ASK, 1, 0, 60.0, generation, "")
        return base64.b64encode(encode(envelope, message, 1 << 20)).decode()

    async def scenario(state: str) -> None:
        place = topology(f"port = {free_ports(8)}", bus='transport = "tcp"', state=state)
        async with playing(place) as stage:
            for name in stage.workers:
                await stage.hello(name)
            await stage.submit()
            work = await stage.next_work("encoder-0")
            found = await knock(
                address=place.component("head").address,
                frames=[
                    forged("encoder-0", 2**62, Inspect()),
                    forged("decoder-0", 1, finished(work)),
                    forged("nobody", 0, requests.CancelRequest("r")),
                    forged("nobody", 0, requests.ClusterQuery()),
                    forged("nobody", 0, Shutdown("for fun")),
                ],
                paths=[state, *map(str, place.state_dir.iterdir())],
            )
            for events, answers in (found["plain"], found["curve"]):
                assert (events[-1] in ("hung up on", "no CURVE"), answers) == (True, 0)
            assert f"{state}/bus.key" in found["unreadable"]
            assert set(found["unreadable"].values()) == {"PermissionError"}
            await stage.report(stages.InstanceAlive("encoder-0", 1))
            assert (await stage.view()).units[0].state == "ENCODER_WAITING"

    with tempfile.TemporaryDirectory() as open_to_all:
        Path(open_to_all).chmod(0o755)
        play(scenario(f"{open_to_all}/state"))


async def knock(**task: Any) -> dict[str, Any]:
    """What another user finds; see `tests.roles.stranger`."""
    arguments = (sys.executable, "-m", "tests.roles.stranger")
    process = await asyncio.create_subprocess_exec(*arguments, stdin=PIPE, stdout=PIPE)
    answer, _ = await process.communicate(json.dumps(task).encode())
    found: dict[str, Any] = json.loads(answer)
    return found
