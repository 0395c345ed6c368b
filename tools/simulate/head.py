"""Drive the real head with simulated instances: the cost of an event, and the time of a decision.

The head is the actor of a system, with its schedulers, its effects and its journal on a disk. Only the bus is left out:
its messages are handed over as objects, and instances and a pool that compute nothing answer them. They decide when
things happen by a clock of their own, in which requests arrive at `rate` and the denoisers can just keep up, however
many they are. The CPU time that the head takes passes on that clock too: what comes meanwhile waits, and is handled
together, as in a mailbox. The CPU seconds for a second of that clock are the cores that the head needs; at 1 it no
longer keeps up.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import logging
import math
import random
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final, cast, get_args

import structlog

from triptych.actors import AddressBook, Topology, load_topology
from triptych.actors.runtime._actor_cell import MAX_HANDLED
from triptych.actors.runtime.actor import current_sender
from triptych.actors.runtime.handlers import DeferredReply
from triptych.actors.topology.sections import DispatchName, SchedulingPolicyName
from triptych.bus import Message, Outbox, Sender
from triptych.engines.parameters.schema import Parameter, ParameterKind, Signature
from triptych.engines.stages import Stage
from triptych.roles.head.head import Head
from triptych.roles.messages import pool as pools
from triptych.roles.messages import requests, stages
from triptych.roles.messages.common import Artifact, Attempt, Input, LeaseRef, Output, StoredPayload
from triptych.tools.command import Commands, above_zero, add_subcommand, at_least_one, table

EXAMPLES: Final = """\
examples:
  python -m triptych.tools.simulate head                                 10, 100 and 1,000 instances, 10,000 in flight
  python -m triptych.tools.simulate head --instances 10 --in-flight 100 --json
  python -m triptych.tools.simulate head --policy shortest_remaining --priorities 3

event_us is CPU time for a message that the head handled, all that followed included: the journal, what it sent, and the
simulated instances. p50_us and p99_us are from the arrival of a message to the end of its decision. cores are what
the rate takes, per_s is the rate that was reached.
"""
SLOTS: Final = 8
STEPS: Final = 4
"""Reported steps of a denoise."""
SHARES: Final = {Stage.ENCODER: 0.1, Stage.DENOISER: 0.8, Stage.DECODER: 0.1}
"""Share of the instances of each stage; what one does in a second is such that all stages keep up."""
LOAD: Final = 1.0
"""Requests that arrive, as a share of what the instances can do."""
SIGNATURE: Final = Signature(
    (
        Parameter("num_inference_steps", ParameterKind.INTEGER, STEPS),
        Parameter("prompt", ParameterKind.TEXT, required=True),
    ),
    encodes=("prompt",),
)
_PAGE: Final = 1000
_WAIT_S: Final = 86400.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated."""

    instances: int = 10
    in_flight: int = 10_000
    """Requests that are under way all the time."""
    rate: float = 500.0
    """Requests that arrive and end in a simulated second."""
    requests: int = 2000
    """Requests that end while it is measured."""
    policy: str = "fifo"
    dispatch: str = "round_robin"
    priorities: int = 1
    """How many different priorities requests have, in turn."""

    def count(self, stage: Stage) -> int:
        """Return the number of instances of a stage."""
        return max(1, round(self.instances * SHARES[stage]))

    def stage_s(self, stage: Stage) -> float:
        """Return the simulated seconds that an instance takes for a stage."""
        return LOAD * self.count(stage) * SLOTS / self.rate


class _Peer:
    """An instance or the pool, as the head reaches it."""

    def __init__(self, name: str, cluster: SimulatedCluster) -> None:
        self._name, self._cluster = name, cluster

    async def ask(self, message: Message, *_replies: type[Message], timeout_s: float) -> Message:
        """Answer at once."""
        match message:
            case stages.StageAssign() | stages.TransferPush():
                self._cluster.begin(self._name, message.attempt)
                return stages.StageTaken(message.attempt)
            case pools.PoolQuery():
                return pools.PoolDescription(self._name, 1, 1 << 40, 1 << 40, 0, "", 0, "none")
            case pools.LeaseQuery():
                return self._cluster.leases_after(message.after)
            case pools.ReleaseBlocks():
                for lease in message.leases:
                    del self._cluster.leases[lease.lease_id]
                return pools.BlocksReleased(len(message.leases))
            case _:
                raise TypeError(f"no instance or pool is asked {type(message).__name__}")

    def tell(self, message: Message) -> None:
        """Park what is to be parked."""
        if isinstance(message, stages.StagePark):
            self._cluster.park(self._name, message.attempt)

    async def down(self) -> None:
        """Never end."""
        await asyncio.Event().wait()


class _Peers:
    """What the head sends with, in place of an outbox."""

    def __init__(self, cluster: SimulatedCluster) -> None:
        self._cluster = cluster
        self._peers: dict[str, _Peer] = {}

    def reference(self, name: str, _address: str) -> _Peer:
        """Return a simulated instance or pool."""
        if name not in self._peers:
            self._peers[name] = _Peer(name, self._cluster)
        return self._peers[name]


class SimulatedCluster:
    """A head, and the instances and clients around it.

    Args:
        scenario: What is simulated.
        folder: An empty folder, for the topology and the journal.
    """

    def __init__(self, scenario: Scenario, folder: Path) -> None:
        self.scenario = scenario
        topology = _topology(scenario, folder)
        self.head = Head(topology)
        self.head.generation, self.head.restarts = 1, 0
        self.head.address_book = AddressBook(topology)
        self.head.outbox = cast(Outbox, _Peers(self))
        self.now = 0.0
        """Simulated seconds."""
        self.leases: dict[int, pools.LeaseView] = {}
        self.completed = 0
        self.events = 0
        """Messages that the head has handled."""
        self.decisions: list[float] = []
        """Simulated seconds from the arrival of each message to the end of its decision."""
        self._random = random.Random(0)
        self._numbers = count(1)
        self._queue: list[tuple[float, int, Callable[[], Coroutine[Any, Any, None]]]] = []
        self._more = asyncio.Event()
        self._issued: dict[str, int] = {}
        self._running: dict[Attempt, str] = {}
        self._parked: set[Attempt] = set()
        self._generation = 1

    # -- the run

    async def start(self) -> None:
        """Start the head, register the instances and submit what is to be in flight."""
        await self.head.started()
        for stage in Stage:
            for k in range(self.scenario.count(stage)):
                await self._register(f"{stage.value}-{k}", stage)
        for _ in range(self.scenario.in_flight):
            await self._submit()
            self.head.caught_up()
            await _settle()

    async def run(self, ended: int) -> None:
        """Go on until so many requests have ended; a new one comes for each."""
        wanted = self.completed + ended
        while self.completed < wanted:
            if not self._queue:  # what is under way waits for the disk
                self._more.clear()
                await self._more.wait()
            self.now = max(self.now, self._queue[0][0])
            arrived: list[float] = []
            began = time.thread_time()
            while self._queue and self._queue[0][0] <= self.now and len(arrived) < MAX_HANDLED:
                at, _, happen = heapq.heappop(self._queue)
                arrived.append(at)
                await happen()
            self.head.caught_up()
            await _settle()
            self.now += time.thread_time() - began
            self.decisions += (self.now - at for at in arrived)

    async def stop(self) -> None:
        """Stop the head."""
        for task in tuple(self.head._tasks):
            task.cancel()
        await asyncio.gather(*self.head._tasks, return_exceptions=True)
        await self.head.stopping()

    async def _handle(self, sender: str, handler: Callable[[Any], Coroutine[Any, Any, Any]], message: Message) -> None:
        """Hand a message to the head, as the runtime does."""
        current_sender.set(Sender(sender, self._generation))
        self.events += 1
        reply = await handler(message)
        if isinstance(reply, DeferredReply):
            self.head.spawn(self._reply(reply.coroutine), name="reply")

    async def _reply(self, reply: Coroutine[Any, Any, Message]) -> None:
        answer = await reply
        if isinstance(answer, requests.RequestAccepted):
            await self._handle("api", self.head.wait, requests.WaitRequest(answer.request_id, _WAIT_S))
        if isinstance(answer, requests.RequestView):
            self.completed += 1
            self._after(0.0, self._submit)

    def _after(self, seconds: float, happen: Callable[[], Coroutine[Any, Any, None]]) -> None:
        heapq.heappush(self._queue, (self.now + seconds, next(self._numbers), happen))
        self._more.set()

    # -- clients

    async def _submit(self) -> None:
        """Submit a request; `_reply` waits for its end."""
        number = next(self._numbers)
        inputs: dict[str, Input] = {"prompt": f"request {number}", "num_inference_steps": STEPS}
        priority = number % self.scenario.priorities
        id_ = f"r{number}"
        message = requests.SubmitRequest(id_, inputs, number, 1, Output("png"), priority=priority)
        await self._handle("api", self.head.submit, message)

    # -- instances

    async def _register(self, name: str, stage: Stage) -> None:
        self._issued[name] = SLOTS
        registration = stages.RegisterInstance(
            name, stage.value, self._generation, 1, SLOTS, SLOTS, 0, "pool", SIGNATURE, (), model="1",
            stores_checkpoints=stage is Stage.DENOISER,
        )  # fmt: skip
        await self._handle(name, self.head.register, registration)

    def begin(self, name: str, attempt: Attempt) -> None:
        """Begin an attempt; what an instance has is computed side by side."""
        stage = Stage(name.partition("-")[0])
        self._running[attempt] = name
        # At first the instances are put out of step; later no two attempts take just as long.
        factor = self._random.uniform(0.0, 1.0) if not self.now else self._random.uniform(0.9, 1.1)
        seconds = self.scenario.stage_s(stage) * factor
        self._after(0.0, lambda: self._started(name, stage, attempt))
        if stage is Stage.DENOISER:
            self._after(seconds / STEPS, lambda: self._step(name, attempt, 1, seconds / STEPS))
        self._after(seconds, lambda: self._end(name, stage, attempt))

    def park(self, name: str, attempt: Attempt) -> None:
        """Give an attempt back."""
        self._after(0.0, lambda: self._return(name, attempt))

    async def _started(self, name: str, stage: Stage, attempt: Attempt) -> None:
        await self._handle(name, self.head.stage_started, stages.StageStarted(attempt, stage))

    async def _step(self, name: str, attempt: Attempt, step: int, step_s: float) -> None:
        if attempt in self._running:
            await self._handle(name, self.head.stage_progress, stages.StageProgress(attempt, step, STEPS))
            if step < STEPS:
                self._after(step_s, lambda: self._step(name, attempt, step + 1, step_s))

    async def _return(self, name: str, attempt: Attempt) -> None:
        if self._running.pop(attempt, ""):
            self._issued[name] += 1
            await self._handle(name, self.head.stage_returned, stages.StageReturned(attempt, self._issued[name]))

    async def _end(self, name: str, stage: Stage, attempt: Attempt) -> None:
        if not self._running.pop(attempt, ""):
            return
        self._issued[name] += 1
        issued, seconds = self._issued[name], self.scenario.stage_s(stage)
        if stage is Stage.DECODER:
            finished = stages.StageFinished(attempt, stage, Artifact("0.png", "image/png", 1), seconds, issued)
            await self._handle(name, self.head.stage_finished, finished)
            return
        lease = LeaseRef("pool", 1, next(self._numbers), 0, 64)
        self.leases[lease.lease_id] = pools.LeaseView(lease, "sealed", name, self._generation, attempt)
        stored = stages.StageOutputsStored(attempt, stage, StoredPayload(lease, b"", 0, 64), seconds, issued)
        await self._handle(name, self.head.stage_outputs_stored, stored)

    def leases_after(self, lease_id: int) -> pools.LeaseReport:
        """Return a page of the blocks of the pool."""
        found = [view for number, view in self.leases.items() if number > lease_id]
        return pools.LeaseReport(tuple(found[:_PAGE]), len(found) > _PAGE)


def _topology(scenario: Scenario, folder: Path) -> Topology:
    model = folder / "model"
    model.mkdir()
    (model / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    roles = "\n".join(f'[[roles]]\nkind = "{stage}"\ncount = {scenario.count(stage)}' for stage in Stage)
    path = folder / "simulated.toml"
    path.write_text(
        f'[model]\npath = "model"\n[head]\nmax_pending = {2 * scenario.in_flight + 1}\nrequest_timeout_s = 86400\n'
        f'policy = "{scenario.policy}"\ndispatch = "{scenario.dispatch}"\n'
        f"[supervision]\nheartbeat_timeout_s = 86400\n{roles}\n"
    )
    return load_topology(path)


async def _settle() -> None:
    """Let the tasks run that wait for nothing but their turn."""
    for _ in range(3):
        await asyncio.sleep(0)


async def _measure(scenario: Scenario, folder: Path) -> dict[str, Any]:
    cluster = SimulatedCluster(scenario, folder)
    began = time.process_time()
    await cluster.start()
    started_s = time.process_time() - began
    await cluster.run(max(1, scenario.requests // 4))  # until what is in flight is spread over the stages
    cluster.decisions.clear()
    events, completed, simulated = cluster.events, cluster.completed, cluster.now
    began, began_at = time.process_time(), time.monotonic()
    await cluster.run(scenario.requests)
    cpu_s, wall_s = time.process_time() - began, time.monotonic() - began_at
    events, completed, simulated = cluster.events - events, cluster.completed - completed, cluster.now - simulated
    await cluster.stop()
    decisions = sorted(cluster.decisions)
    return {
        "instances": scenario.instances,
        "in_flight": scenario.in_flight,
        "policy": scenario.policy,
        "events_per_s": round(events / wall_s),
        "event_us": round(1e6 * cpu_s / events, 1),
        "p50_us": round(1e6 * decisions[len(decisions) // 2], 1),
        "p99_us": round(1e6 * decisions[math.ceil(len(decisions) * 0.99) - 1], 1),
        "cores": round(cpu_s / completed * scenario.rate, 2),
        "per_s": round(completed / simulated),
        "cpu_ms_per_request": round(1e3 * cpu_s / completed, 3),
        "requests": completed,
        "simulated_s": round(simulated, 2),
        "start_cpu_s": round(started_s, 1),
    }


def measure(scenario: Scenario) -> dict[str, Any]:
    """Simulate, and return the figures."""
    with tempfile.TemporaryDirectory(prefix="simulate-") as folder:
        return asyncio.run(_measure(scenario, Path(folder)))


def run(options: argparse.Namespace) -> None:
    """Simulate, and print a row for each number of instances."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    found = []
    for instances in options.instances:
        scenario = Scenario(
            instances=instances,
            in_flight=options.in_flight,
            rate=options.rate,
            requests=options.requests,
            policy=options.policy,
            dispatch=options.dispatch,
            priorities=options.priorities,
        )
        found.append(measure(scenario))
        if options.json:
            print(json.dumps(found[-1]), flush=True)
    if not options.json:
        print(table(found))


def add_command(commands: Commands) -> None:
    """Add the command `head`."""
    parser = add_subcommand(commands, "head", "drive the real head with simulated instances", EXAMPLES, run)
    parser.add_argument(
        "--instances", type=at_least_one, nargs="+", default=[10, 100, 1000], help="default: 10 100 1000"
    )
    parser.add_argument("--in-flight", type=at_least_one, default=10_000, help="requests under way (default: 10000)")
    parser.add_argument("--rate", type=above_zero, default=500.0, help="requests a simulated second (default: 500)")
    parser.add_argument("--requests", type=at_least_one, default=2000, help="that end while measured (default: 2000)")
    parser.add_argument("--policy", choices=get_args(SchedulingPolicyName), default="fifo", help="default: fifo")
    parser.add_argument(
        "--dispatch", choices=get_args(DispatchName), default="round_robin", help="default: round_robin"
    )
    parser.add_argument("--priorities", type=at_least_one, default=1, help="different ones, in turn (default: 1)")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
