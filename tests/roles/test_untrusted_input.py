"""Untrusted peers and malformed messages cannot harm an actor."""

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
from tests.roles.head.head_harness import finished, run_scenario, running_head, topology
from triptych.actors import Actor, AddressBook, Incarnation, Topology
from triptych.actors.runtime.runtime import Runtime
from triptych.actors.runtime.system_messages import Inspect, Shutdown
from triptych.bus import Envelope, EnvelopeKind, Message, Outbox, Reference, RemoteError
from triptych.bus._wire import BadBodyError, BodyDecoder, encode
from triptych.engines.parameters.schema import Signature
from triptych.roles.head.head import Head
from triptych.roles.messages import pool as pools
from triptych.roles.messages import requests, stages, worker
from triptych.roles.messages.common import Attempt
from triptych.roles.messages.stages import Acknowledged
from triptych.roles.pool.pool import BufferPool
from triptych.roles.pool.pool import build as build_pool
from triptych.roles.worker.instance import Instance
from triptych.roles.worker.process_context import ProcessContext

__all__ = ["topology"]  # the fixture

KIND_DESCRIPTIONS = (
    "r",
    "r/0",
    "r/1",
    "encoder-0",
    "denoiser-0",
    "decoder-0",
    "encoder",
    "denoiser",
    "pool",
    "prompt",
    "png",
    "",
)
"""What names a thing in the tests below, so that not every message is about nothing."""
SETTINGS = settings(
    max_examples=150,
    deadline=None,
    phases=[Phase.generate],  # an actor that has ended cannot be asked for a smaller example
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


CANCEL = stages.StageCancel(Attempt("", 0), "")
_numbers = itertools.count(1 << 32)


class Stream(Actor):
    """Takes what an instance tells its stream worker, and does nothing."""

    async def take(self, message: worker.RunStage | worker.CancelAttempt | worker.SetWeightsLoaded) -> None:
        pass


class Transfer(Actor):
    """Takes what an instance tells its transfer actor, and does nothing."""

    async def take(self, message: worker.StoreOutputs | worker.LoadInputs | worker.CancelAttempt) -> None:
        pass


@pytest.fixture
def actors(topology: Callable[..., Topology]) -> Callable[[str], AbstractAsyncContextManager[Any]]:
    """Run the real head, pool or encoder-0 of a topology, the first with a request under way."""

    @asynccontextmanager
    async def head() -> AsyncIterator[Any]:
        async with running_head(topology()) as harness:
            for name in harness.workers:
                await harness.register(name)
            await harness.submit(n=2)
            yield harness.head_as("encoder-0")

    @asynccontextmanager
    async def other(name: str) -> AsyncIterator[Any]:
        made_topology = topology()
        address_book, outbox = AddressBook(made_topology), Outbox("test")
        component = made_topology.component(name)
        context = ProcessContext(component)
        if name == "pool":
            inside: list[Actor] = build_pool(component, made_topology)
        else:
            inside = [
                Instance(component, made_topology, context),
                Stream(f"{name}.stream"),
                Transfer(f"{name}.transfer"),
            ]
            context.model_loaded(Signature(), 1)
            context.model_known("model", "cpu")
            context.pool_mapped()
        async with Runtime(inside, Incarnation(address_book, 1)):
            yield outbox.reference(name, address_book.address(name))
            outbox.close()

    return lambda name: head() if name == "head" else other(name)


@pytest.mark.parametrize(
    ("name", "messages", "last"),
    [
        ("head", tuple(Head.handlers), stages.StageProgress(Attempt("", 0), 0, 0)),
        ("pool", tuple(BufferPool.handlers), pools.PoolQuery()),
        ("encoder-0", tuple(Instance.handlers), CANCEL),
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
            with contextlib.suppress(RemoteError):  # that it is told, and never asked: the actor's own answer
                await reference.ask(last, Acknowledged, pools.PoolDescription, timeout_s=20)

        @SETTINGS
        @given(st.lists(bodies_of(messages, KIND_DESCRIPTIONS), max_size=5))
        def check(bodies: list[bytes]) -> None:
            runner.run(survives(bodies))

        check()
        runner.run(actor.__aexit__(None, None, None))  # raises what an actor crashed with


LEASE = ("pool", 1, 1, 0, 64)


@pytest.mark.parametrize(
    "fields",
    [
        ("StageStarted", ("r/0", 1), "bogus"),
        ("StageOutputsStored", ("r/0", 1), "bogus", (LEASE, b"", 0, 64), 0.1, 3),
        ("StageOutputsStored", ("r/0", 1), "denoiser", (("pool", 1, 1, -1, 64), b"", 0, 64), 0.1, 3),
        ("StageFinished", ("r/0", 1), "decoder", ("r_0.png", "image/png", -1), 0.1, 3),
        ("StageProgress", ("r/0", 1), -1, 3),
        ("SubmitRequest", "r", {"prompt": "x"}, 2**64 - 1, 2),
        ("WaitRequest", "r", float("nan")),
        ("CancelRequest", "x" * 129),
        ("ListRequests", "", "", 2**63 - 1),
        ("InstanceHeartbeat", 2**62),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused_by_the_decoder(fields: tuple[object, ...]) -> None:
    with pytest.raises(BadBodyError, match="invalid_message"):
        BodyDecoder(tuple(Head.handlers)).decode(memoryview(msgspec.msgpack.encode(fields)))


def send(reference: Reference, body: bytes) -> None:
    """Ask for nothing that is waited for: the answer is a dead letter of the outbox."""
    envelope = Envelope(reference.name, "test", EnvelopeKind.ASK, next(_numbers), 0, 60.0, 0)
    head = msgspec.msgpack.encode(envelope)
    reference._connect().send(envelope.message_id, len(head).to_bytes(2, "big") + head + body)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_of_the_host_changes_nothing_over_tcp_and_learns_nothing(
    topology: Callable[..., Topology],
) -> None:
    def forged(sender: str, generation: int, message: Any) -> str:
        envelope = Envelope("head", sender, EnvelopeKind.ASK, 1, 0, 60.0, generation)
        return base64.b64encode(encode(envelope, message, 1 << 20)).decode()

    async def scenario(state: str) -> None:
        # Without a short heartbeat timeout: the instances here send no heartbeats while the probe starts.
        made_topology = topology(f"port = {free_ports(8)}", bus='transport = "tcp"', state=state, supervision="")
        async with running_head(made_topology) as harness:
            for name in harness.workers:
                await harness.register(name)
            await harness.submit()
            attempt = await harness.next_attempt("encoder-0")
            found = await probe(
                address=made_topology.component("head").address,
                frames=[
                    forged("encoder-0", 2**62, Inspect()),
                    forged("decoder-0", 1, finished(attempt)),
                    forged("nobody", 0, requests.CancelRequest("r")),
                    forged("nobody", 0, requests.ClusterQuery()),
                    forged("nobody", 0, Shutdown("for fun")),
                ],
                paths=[state, *map(str, made_topology.state_dir.iterdir())],
            )
            for events, answers in (found["plain"], found["curve"]):
                assert (events[-1] in ("hung up on", "no CURVE"), answers) == (True, 0)
            assert f"{state}/bus.key" in found["unreadable"]
            assert set(found["unreadable"].values()) == {"PermissionError"}
            await harness.report(stages.InstanceHeartbeat(), "encoder-0")
            assert (await harness.view()).units[0].state == "ENCODER_WAITING"

    with tempfile.TemporaryDirectory() as open_to_all:
        Path(open_to_all).chmod(0o755)
        run_scenario(scenario(f"{open_to_all}/state"))


async def probe(**task: Any) -> dict[str, Any]:
    """What another user finds; see `tests.roles.unauthorized_peer`."""
    arguments = (sys.executable, "-m", "tests.roles.unauthorized_peer")
    process = await asyncio.create_subprocess_exec(*arguments, stdin=PIPE, stdout=PIPE)
    answer, _ = await process.communicate(json.dumps(task).encode())
    found: dict[str, Any] = json.loads(answer)
    return found
