"""Compare scheduling policies on a simulated system: `python -m triptych.tools.simulate policies`.

A discrete-event simulation. It decides with the objects that decide in a system: `JobScheduler` in the head and a
`StepScheduler` in each instance, both by the policies of `roles.scheduling_policy`. The time of a stage or a step comes
from `Costs`. Messages and transfers take no time, and nothing fails.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final, get_args

from triptych.actors.topology.sections import SchedulingPolicyName
from triptych.engines.parameters.schema import Signature
from triptych.engines.stages import Stage
from triptych.percentile import percentile
from triptych.roles.head.attempt_messages import message_for, source_of
from triptych.roles.head.dispatch import POLICIES
from triptych.roles.head.effects import Assign
from triptych.roles.head.job import Job, Request
from triptych.roles.head.registry import InstanceRegistry
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.messages.common import Artifact, Attempt, LeaseRef, Output, StoredPayload
from triptych.roles.messages.stages import RegisterInstance, StageFinished, StageOutputsStored
from triptych.roles.worker.attempts import STAGES_OF_ROLE, ActiveAttempt, Phase
from triptych.roles.worker.step_scheduler import StepScheduler
from triptych.tools.command import Commands, above_zero, add_subcommand, at_least_one, share, table

SIZES: Final = {512: 4, 768: 3, 1024: 3}
"""Sides of the square images in pixels, and how often each is asked for."""
STEPS: Final = {4: 5, 8: 2, 28: 2, 50: 1}
"""Numbers of denoising steps, and how often each is asked for."""
DEADLINE_FACTOR: Final = 3.0
"""Deadline of a request, as a multiple of its time alone on the system."""
_TIMEOUT_S: Final = 1e7
"""The timeout of a request: none is to time out."""
_BISECTIONS: Final = 12
EXAMPLES: Final = """\
examples:
  python -m triptych.tools.simulate policies                          every policy at 60 % of deadlines met
  python -m triptych.tools.simulate policies --load 0.8 --json | jq . at 80 % of the capacity, as JSON lines
  python -m triptych.tools.simulate policies --slots 4 --max-batch 4  with batches of four
  python -m triptych.tools.simulate policies --requests 100 --seed 3 another, shorter trace

Times are simulated seconds. slowdown_4 is the 95th percentile, over requests of 4 steps, of the time that they took
divided by their time alone.
"""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that stages and steps take."""

    encode_s: float = 0.05
    decode_s: float = 0.10
    step_s: float = 0.10
    """One denoising step of one image of 1024 x 1024 pixels; other sizes in proportion to their pixels."""
    row: float = 0.23
    """Cost of each further row of a batch, in steps: 8 rows take 2.6 times as long as one."""

    def step(self, size: int, rows: int = 1) -> float:
        """Return the seconds of one step of `rows` images of a size."""
        return self.step_s * (size / 1024) ** 2 * (1 + self.row * (rows - 1))

    def alone_s(self, steps: int, size: int) -> float:
        """Return the seconds of a request on an idle system."""
        return self.encode_s + steps * self.step(size) + self.decode_s


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of a trace."""

    at: float
    """Seconds from the beginning of the trace."""
    steps: int
    size: int
    deadline_s: float
    """Seconds from its arrival."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request of a trace fared."""

    arrival: Arrival
    latency_s: float

    @property
    def met(self) -> bool:
        """Return whether it met its deadline."""
        return self.latency_s <= self.arrival.deadline_s


@dataclass(frozen=True, slots=True)
class System:
    """What is simulated."""

    policy: SchedulingPolicyName
    """Of the head and of the denoisers."""
    denoisers: int = 1
    slots: int = 8
    max_batch: int = 1
    costs: Costs = Costs()


def make_trace(requests: int, load: float, seed: int, denoisers: int = 1, costs: Costs | None = None) -> list[Arrival]:
    """Make a trace with Poisson arrivals; two loads with one seed differ in nothing but the gaps between arrivals.

    Args:
        requests: How many.
        load: Work that arrives, as a share of what the denoisers can do one run at a time.
        seed: Of the random numbers.
        denoisers: How many instances the load is meant for.
        costs: Seconds that stages and steps take.
    """
    costs = costs or Costs()
    choose = random.Random(seed)
    work_s = sum(
        costs.step(size) * steps * often * frequency
        for size, often in SIZES.items()
        for steps, frequency in STEPS.items()
    ) / (sum(SIZES.values()) * sum(STEPS.values()))
    at, trace = 0.0, []
    for _ in range(requests):
        at += choose.expovariate(1.0) * work_s / (load * denoisers)
        (size,) = choose.choices(list(SIZES), list(SIZES.values()))
        (steps,) = choose.choices(list(STEPS), list(STEPS.values()))
        trace.append(Arrival(at, steps, size, DEADLINE_FACTOR * costs.alone_s(steps, size)))
    return trace


@dataclass(slots=True)
class _Run:
    item: ActiveAttempt
    size: int
    steps: int
    """Rounds that it takes here."""
    done: int = 0
    began: float | None = None


@dataclass(slots=True)
class _Instance:
    name: str
    stage: Stage
    steps: StepScheduler
    issued: int
    """Credits that it has issued."""
    runs: dict[Attempt, _Run] = field(default_factory=dict)
    busy: bool = False


class Simulation:
    """A head and its instances, driven by a clock that jumps from event to event."""

    def __init__(self, system: System) -> None:
        self.now = 0.0
        self._costs = system.costs
        self._elapsed = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._arrivals: dict[str, Arrival] = {}
        self._outcomes: list[Outcome] = []
        slots = {Stage.ENCODER: 2, Stage.DENOISER: system.slots, Stage.DECODER: 2}
        counts = {stage: system.denoisers if stage is Stage.DENOISER else 1 for stage in Stage}
        registry = InstanceRegistry({stage: slots[stage] * counts[stage] for stage in Stage})
        self.head = JobScheduler(POLICIES["least_loaded"], system.policy, registry=registry)
        self._instances: dict[str, _Instance] = {}
        for stage in Stage:
            policy, max_batch = (system.policy, system.max_batch) if stage is Stage.DENOISER else ("fifo", 1)
            for k in range(counts[stage]):
                name = f"{stage.value}-{k}"
                self._instances[name] = _Instance(name, stage, StepScheduler(policy, max_batch), slots[stage])
                self.head.register(_registration(name, stage, slots[stage], max_batch), 0.0)

    def run(self, trace: Sequence[Arrival]) -> list[Outcome]:
        """Return the outcome of every request of a trace, in the order in which they ended."""
        for index, arrival in enumerate(trace):
            self._at(arrival.at, lambda id_=f"r{index}", arrival=arrival: self._arrive(id_, arrival))  # type: ignore[misc]
        while self._events:
            self.now, _, happen = heapq.heappop(self._events)
            happen()
        return self._outcomes

    def _at(self, when: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), happen))

    # -- the head

    def _arrive(self, id_: str, arrival: Arrival) -> None:
        self._arrivals[id_] = arrival
        inputs = {"num_inference_steps": arrival.steps, "height": arrival.size, "width": arrival.size}
        job = Job(f"{id_}/0", id_, 0, 0, _TIMEOUT_S)
        request = Request(id_, dict(inputs), Output(), self.now, self.now + _TIMEOUT_S, [job])
        request.steps, request.deadline_s = arrival.steps, arrival.deadline_s
        self.head.accept(request, self.now)
        self._dispatch()

    def _dispatch(self) -> None:
        self.head.elapse(self.now - self._elapsed, self.now)
        self._elapsed = self.now
        self.head.dispatch(self.now)
        for effect in self.head.take_effects():
            if isinstance(effect, Assign):  # what else there is, are leases of no pool and waiters of no client
                self._take(self._instances[effect.instance], self.head.jobs[effect.job_id])

    def _ended(self, instance: _Instance, run: _Run) -> None:
        instance.issued += 1
        attempt, seconds = run.item.attempt, self.now - (run.began or 0.0)
        if instance.stage is Stage.DECODER:
            artifact = Artifact("image.png", "image/png", 0)
            report = StageFinished(attempt, instance.stage, artifact, seconds, instance.issued)
            self.head.finished(instance.name, report, self.now)
            id_ = attempt.job_id.partition("/")[0]
            self.head.forget([id_])
            arrival = self._arrivals.pop(id_)
            self._outcomes.append(Outcome(arrival, self.now - arrival.at))
        else:
            payload = StoredPayload(LeaseRef("pool", 1, next(self._numbers), 0, 0), b"", 0, 0)
            stored = StageOutputsStored(attempt, instance.stage, payload, seconds, instance.issued)
            self.head.stored(instance.name, stored, self.now)

    # -- an instance

    def _take(self, instance: _Instance, job: Job) -> None:
        attempt = job.current_attempt
        message = message_for(self.head, attempt, source_of(self.head, attempt, instance.name), None)
        hints = message.hints
        item = ActiveAttempt(
            attempt, Phase.RUNNING, STAGES_OF_ROLE[instance.stage.value], Output(), self.now + message.left_s
        )
        item.hints, item.due = hints, self.now + (hints.due_s or 0.0)
        arrival = self._arrivals[job.request_id]
        steps = arrival.steps if instance.stage is Stage.DENOISER else 1
        instance.runs[attempt] = _Run(item, arrival.size, steps)
        instance.steps.add(item)
        self.head.started(attempt, instance.name, instance.stage, self.now)
        self._begin_round(instance)

    def _begin_round(self, instance: _Instance) -> None:
        if instance.busy or not len(instance.steps):
            return
        instance.busy = True
        attempts = instance.steps.next(self.now)
        for attempt in attempts:
            run = instance.runs[attempt]
            run.began = self.now if run.began is None else run.began
        seconds = self._round_s(instance.stage, [instance.runs[attempt] for attempt in attempts])
        self._at(self.now + seconds, lambda: self._end_round(instance, attempts, seconds))

    def _round_s(self, stage: Stage, runs: Sequence[_Run]) -> float:
        if stage is not Stage.DENOISER:
            return self._costs.encode_s if stage is Stage.ENCODER else self._costs.decode_s
        bucket = runs[0].item.hints.bucket  # a batch is padded to it, and only equal sizes are in one batch
        return sum(self._costs.step(size, bucket) for size in {run.size for run in runs})

    def _end_round(self, instance: _Instance, attempts: tuple[Attempt, ...], seconds: float) -> None:
        instance.busy = False
        ended = False
        for attempt in attempts:
            run = instance.runs[attempt]
            run.done += 1
            if instance.stage is Stage.DENOISER:
                instance.steps.stepped(attempt, run.done, run.steps, run.size)
                self.head.progress(attempt, run.done, run.steps, self.now)
        if instance.stage is Stage.DENOISER:
            instance.steps.ran(attempts, seconds)
        for attempt in attempts:
            if instance.runs[attempt].done == instance.runs[attempt].steps:
                instance.steps.remove(attempt)
                self._ended(instance, instance.runs.pop(attempt))
                ended = True
        if ended:
            self._dispatch()
        self._begin_round(instance)


def _registration(name: str, stage: Stage, slots: int, max_batch: int) -> RegisterInstance:
    return RegisterInstance(
        name=name,
        kind=stage.value,
        generation=1,
        pid=1,
        slots=slots,
        issued=slots,
        taken=0,
        pool="pool",
        signature=Signature(),
        running=(),
        max_batch=max_batch,
    )


def summarize(outcomes: Sequence[Outcome], costs: Costs) -> dict[str, float]:
    """Return the figures of a run: attainment from 0 to 1, latencies in seconds, requests per second."""
    latencies = [outcome.latency_s for outcome in outcomes]
    begin = min(outcome.arrival.at for outcome in outcomes)
    end = max(outcome.arrival.at + outcome.latency_s for outcome in outcomes)
    short = [
        outcome.latency_s / costs.alone_s(outcome.arrival.steps, outcome.arrival.size)
        for outcome in outcomes
        if outcome.arrival.steps == min(STEPS)
    ]
    return {
        "attainment": round(sum(outcome.met for outcome in outcomes) / len(outcomes), 4),
        "p50_s": round(percentile(latencies, 50), 3),
        "p95_s": round(percentile(latencies, 95), 3),
        "p99_s": round(percentile(latencies, 99), 3),
        "mean_s": round(statistics.fmean(latencies), 3),
        "throughput_per_s": round(len(outcomes) / (end - begin), 4),
        "slowdown_4": round(percentile(short, 95), 2),
    }


def load_of_attainment(attainment: float, requests: int, seed: int, system: System) -> float:
    """Return the load at which `system` meets that share of the deadlines."""
    low, high = 0.05, 4.0
    for _ in range(_BISECTIONS):
        load = (low + high) / 2
        trace = make_trace(requests, load, seed, system.denoisers, system.costs)
        met = summarize(Simulation(system).run(trace), system.costs)["attainment"]
        low, high = (load, high) if met > attainment else (low, load)
    return (low + high) / 2


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Simulate every policy on one trace; yield a row for each."""
    names: tuple[SchedulingPolicyName, ...] = options.policy or get_args(SchedulingPolicyName)
    costs = Costs()

    def system(policy: SchedulingPolicyName) -> System:
        return System(policy, options.denoisers, options.slots, options.max_batch, costs)

    load = options.load or load_of_attainment(options.attainment, options.requests, options.seed, system("fifo"))
    trace = make_trace(options.requests, load, options.seed, options.denoisers, costs)
    for name in names:
        figures = summarize(Simulation(system(name)).run(trace), costs)
        yield {"policy": name, "load": round(load, 3), "requests": len(trace), **figures}


def run(options: argparse.Namespace) -> None:
    """Simulate, and print a row for each policy."""
    if options.json:
        for row in rows(options):
            print(json.dumps(row), flush=True)
        return
    mix = Counter(arrival.steps for arrival in make_trace(options.requests, 1.0, options.seed))
    print(f"simulated, {options.requests} requests of {', '.join(f'{k} steps: {v}' for k, v in sorted(mix.items()))}")
    print(table(list(rows(options))))


def add_command(commands: Commands) -> None:
    """Add the command `policies`."""
    parser = add_subcommand(commands, "policies", "compare scheduling policies on a simulated system", EXAMPLES, run)
    parser.add_argument("--policy", action="append", choices=get_args(SchedulingPolicyName), help="default: all")
    parser.add_argument("--requests", type=at_least_one, default=1000, help="length of the trace (default: 1000)")
    parser.add_argument("--load", type=above_zero, help="work that arrives, as a share of the capacity without batches")
    parser.add_argument(
        "--attainment", type=share, default=0.6, help="without --load: where fifo meets this share (default: 0.6)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the trace (default: 0)")
    parser.add_argument("--denoisers", type=at_least_one, default=1, help="instances (default: 1)")
    parser.add_argument("--slots", type=at_least_one, default=8, help="of each denoiser (default: 8)")
    parser.add_argument("--max-batch", type=at_least_one, default=1, help="of each denoiser (default: 1)")
    parser.add_argument("--json", action="store_true", help="JSON lines instead of a table")
