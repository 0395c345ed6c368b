"""Every job ends, whatever the sizes of what it hands on and however little memory there is.

The real lease tables, scheduler, stored outputs, preallocated and workloads; what their actors do is steps of tasks
that run in any order. Where something was struck a job may fail, but nothing may wait for ever.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.roles.factories import KINDS, SIGNATURE, make_scheduler, request
from triptych.actors import Component
from triptych.actors.topology import INCOMING, largest_payload, pool_zones
from triptych.bus import Message
from triptych.engines.memory.buddy import PAGE
from triptych.engines.memory.leases import Lease, LeaseError, LeaseState, LeaseTable
from triptych.engines.stages import Stage
from triptych.roles.head.attempt_messages import SourceGoneError, SupersededError, message_for, source_of
from triptych.roles.head.effects import Assign, Cancel, NotifyWaiters, ReleaseLeases
from triptych.roles.head.job import Job, State
from triptych.roles.head.registry import InstanceRegistry
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.messages import stages
from triptych.roles.messages.common import Artifact, Attempt, LeaseRef, StoredPayload
from triptych.roles.messages.pool import ReleaseBlocks
from triptych.roles.messages.stages import RegisterInstance
from triptych.roles.messages.worker import CancelAttempt, LoadInputs, RunStage, SaveArtifact, StoreOutputs
from triptych.roles.pool.pool import zones
from triptych.roles.worker.attempts import AttemptRefusedError, AttemptTracker, EndReport
from triptych.roles.worker.preallocation import Preallocation

Steps = Iterator[None]
ROUNDS = 600
"""Rounds of all tasks in which something has to end; a round is 20 ms, so places in the line expire meanwhile."""
FAR = 1e9


@dataclass
class Incarnation:
    """One life of an instance."""

    name: str
    kind: str
    generation: int
    attempts: AttemptTracker
    preallocated: Preallocation
    pool: str
    alive: bool = True
    queue: list[tuple[Attempt, Stage]] = field(default_factory=list)
    """What the stream worker has to compute, in order."""
    outbox: list[Any] = field(default_factory=list)
    """To the head, in order."""
    usual_nbytes: int = 0
    """Size of its last outputs."""


class SimulatedCluster:
    """The parts that decide, and tasks in place of their actors.

    With engine "shm" all instances share a pool, with "mooncake" those of a kind do, with "hosts" those of a number.
    """

    def __init__(
        self,
        choose: random.Random,
        *,
        pages: int,
        engine: str = "shm",
        count: int = 2,
        slots: int = 2,
        preallocated: int = 2,
        cache: int = 0,
        damage: float = 0.0,
    ) -> None:
        self.choose = choose
        self.capacity = pages * PAGE
        self.engine, self.preallocated, self.damage = engine, preallocated, damage
        names = [(f"{kind}-{k}", kind) for kind in KINDS for k in range(count)]
        self.components = [
            Component(name=name, kind=kind, address="", port=0, pool=self.pool_of(name))  # type: ignore[arg-type]
            for name, kind in names
        ]
        most = max(len(pool_zones(self.components, component.pool)) for component in self.components)
        self.largest = largest_payload(self.capacity, most)
        self.slots = slots
        self.now = 0.0
        self.generation = 1
        self.tasks: list[Steps] = []
        self.sizes: dict[tuple[str, str], int] = {}
        self.scheduler: JobScheduler = make_scheduler(cache=cache, max_attempts=1000)
        self.scheduler.registry = InstanceRegistry(dict.fromkeys(Stage, count * slots))
        self.tables: dict[str, LeaseTable] = {}
        self.generations: dict[str, int] = {}
        self.instances: dict[str, Incarnation] = {}
        self.notified: list[str] = []
        for pool in dict.fromkeys(component.pool for component in self.components):
            self.open_pool(pool)
        for name, _ in names:
            self.join(name)

    # -- what comes from outside

    def submit(self, id_: str, encoded: int, denoised: int, *, n: int = 1, prompt: str = "") -> None:
        self.sizes[(id_, "encoder")], self.sizes[(id_, "denoiser")] = encoded, denoised
        self.scheduler.accept(request(id_, n, timeout_s=FAR, at=self.now, prompt=prompt or id_), self.now)
        self.commit()

    def cancel(self, id_: str) -> None:
        self.scheduler.cancel(id_, "by the test", self.now)
        self.commit()

    def kill(self, name: str) -> None:
        """End an instance; its successor comes at once."""
        dead = self.instances.pop(name)
        dead.alive = False
        for table in self.tables.values():
            table.reclaim_owner(name, dead.generation + 1)
        self.scheduler.instance_down(name, "killed", self.now)
        self.commit()
        self.join(name)

    def restart_pool(self, pool: str) -> None:
        self.open_pool(pool)
        self.scheduler.pool_down(pool, self.generation, self.now)
        self.commit()

    # -- the loop

    def run(self, blows: list[Any]) -> None:
        """Run every task to its end, in any order at first, and strike in between."""
        for blow in blows:
            for _ in range(self.choose.randrange(60)):
                if self.tasks:
                    self.step(self.choose.choice(self.tasks))
            blow()
        since = 0
        while self.scheduler.jobs:
            before = self.progress()
            self.now += 0.02
            for task in tuple(self.tasks):
                self.step(task)
            self.choose.shuffle(self.tasks)
            self.reclaim()
            since = since + 1 if self.progress() == before else 0
            assert since < ROUNDS, f"stalled: {self.image()}"
        while any(i.attempts.active for i in self.instances.values()):
            for task in tuple(self.tasks):
                self.step(task)

    def progress(self) -> object:
        return [(u.id, u.state, u.attempt) for u in self.scheduler.jobs.values()]

    def image(self) -> str:
        jobs = [(u.id, u.state.value, u.instance) for u in self.scheduler.jobs.values()]
        leases = [
            (pool, lease.zone, lease.state.value, lease.request_id, lease.offset // PAGE, lease.capacity // PAGE)
            for pool, table in self.tables.items()
            for lease in table.leases
        ]
        return f"{jobs} {leases}"

    def step(self, task: Steps) -> None:
        try:
            next(task)
        except StopIteration:
            self.tasks.remove(task)

    def commit(self) -> None:
        self.scheduler.dispatch(self.now)
        for effect in self.scheduler.take_effects():
            match effect:
                case Assign(name, job_id):
                    job = self.scheduler.jobs[job_id]
                    self.tasks.append(self.assign(name, job, job.current_attempt))
                case Cancel(name, attempt, _):
                    self.tasks.append(self.stop(name, attempt))
                case ReleaseLeases(leases):
                    self.tasks.append(self.release(leases))
                case NotifyWaiters(id_):
                    self.notified.append(id_)

    # -- the head's tasks

    def assign(self, name: str, job: Job, attempt: Attempt) -> Steps:
        yield
        refused, sent_to = None, self.scheduler.registry.generation(name)
        try:
            yield from self.send(name, job, attempt)
        except AttemptRefusedError as reason:
            refused = reason.code
        except SourceGoneError:
            refused = "cancelled"
        except (OvertakenError, SupersededError):
            self.scheduler.registry.refund(name, sent_to)
        if refused:
            self.scheduler.attempt_refused(name, attempt, refused, refused, self.now)
        self.commit()

    def send(self, name: str, job: Job, attempt: Attempt) -> Steps:
        instance = self.instances[name]
        source, target = source_of(self.scheduler, attempt, name), None
        if source is None:
            yield
            message = message_for(self.scheduler, attempt, None, None)
            self.carry_out(instance, instance.attempts.assign, message, self.now)
            return
        if self.scheduler.registry.needs_block(name, source.lease):
            target = self.scheduler.registry.take_preallocated(name, source.nbytes)
            while target is None:
                yield
                target = self.allocate(instance, attempt, source.nbytes)
                if target is None and (job.current_attempt != attempt or job.instance != name):
                    raise OvertakenError
        yield
        push = message_for(self.scheduler, attempt, source, target)
        preallocated = instance.preallocated.use(target)
        self.tasks.append(self.replenish(instance))
        try:
            self.carry_out(instance, instance.attempts.push, push, self.now, preallocated=preallocated)
        except AttemptRefusedError:
            if preallocated and target:
                self.tasks.append(self.release((target,)))
            raise

    def allocate(self, instance: Incarnation, attempt: Attempt, nbytes: int) -> LeaseRef | None:
        if not instance.alive or not instance.attempts.can_reserve(attempt):
            return None
        target = self.lease(instance, attempt, nbytes, INCOMING)
        if target is None:
            return None
        try:
            self.carry_out(instance, instance.attempts.reserve, attempt, target)
        except AttemptRefusedError:
            self.tasks.append(self.release((target,)))
            raise
        self.tasks.append(self.release(instance.preallocated.require(nbytes)))
        self.tasks.append(self.replenish(instance))
        return target

    def stop(self, name: str, attempt: Attempt) -> Steps:
        yield
        if instance := self.instances.get(name):
            self.carry_out(instance, instance.attempts.cancel, attempt)

    def release(self, leases: tuple[LeaseRef, ...]) -> Steps:
        yield
        for lease in leases:
            if self.find(lease):
                self.tables[lease.pool].release(lease.lease_id)

    def reclaim(self) -> None:
        for pool, table in self.tables.items():
            table.expire(self.now)
            for lease in table.in_state(LeaseState.SEALED):
                reference = self.refer(pool, lease)
                job = self.scheduler.jobs.get(lease.request_id)
                if not self.scheduler.stored_outputs.needs(reference) and (job is None or lease.attempt < job.attempt):
                    table.release(lease.id)

    def wait_for_memory(self, pool: str, nbytes: int) -> Steps:
        yield
        self.scheduler.evict(pool, nbytes)
        self.commit()

    # -- the pools

    def pool_of(self, name: str) -> str:
        kind, _, number = name.partition("-")
        return {"shm": "pool", "mooncake": f"pool-{kind}", "hosts": f"pool-{number}"}[self.engine]

    def open_pool(self, pool: str) -> None:
        self.generation += 1
        table = LeaseTable(
            self.capacity, generation=self.generation, zones=zones(self.capacity, pool_zones(self.components, pool))
        )
        self.tables[pool], self.generations[pool] = table, self.generation

    def lease(self, owner: Incarnation, attempt: Attempt, nbytes: int, zone: str) -> LeaseRef | None:
        """As `BufferPool.lease` does."""
        table = self.tables[owner.pool]
        assert nbytes <= min(table.largest_block(zone), self.largest), "it was said to fit"
        lease = table.lease(
            owner.name, owner.generation, attempt.job_id, attempt.number, nbytes, zone, now=self.now
        )  # fmt: skip
        if lease:
            return self.refer(owner.pool, lease)
        if (wanted := table.first_waiting_bytes(zone)) and zone == "encoder":
            self.tasks.append(self.wait_for_memory(owner.pool, wanted))
        elif wanted:
            for preallocated in table.in_state(LeaseState.WRITING):
                if not preallocated.request_id and preallocated.zone == zone:
                    self.tasks.append(self.release_preallocated(self.instances[preallocated.owner]))
        return None

    def refer(self, pool: str, lease: Lease) -> LeaseRef:
        generation = (lease.id - 1) >> 20
        return LeaseRef(pool, generation, lease.id, lease.offset, lease.nbytes)

    def find(self, reference: LeaseRef) -> Lease | None:
        try:
            return self.tables[reference.pool].get(reference.lease_id)
        except LeaseError:
            return None

    # -- an instance's tasks

    def join(self, name: str) -> None:
        self.generation += 1
        kind = name.partition("-")[0]
        workload = AttemptTracker(name, kind, self.slots)
        instance = Incarnation(
            name,
            kind,
            self.generation,
            workload,
            Preallocation(0 if kind == "encoder" else self.preallocated),
            self.pool_of(name),
        )
        self.instances[name] = instance
        message = RegisterInstance(
            name, kind, self.generation, 1, self.slots, self.slots, 0, instance.pool, SIGNATURE, ()
        )  # fmt: skip
        self.scheduler.register(message, self.now)
        self.tasks += [self.deliver(instance), self.compute(instance)]
        self.commit()

    def carry_out(
        self, instance: Incarnation, decide: Callable[..., tuple[Message, ...]], *args: Any, **kwargs: Any
    ) -> None:
        if not instance.alive:
            raise OvertakenError
        for message in decide(*args, **kwargs):
            match message:
                case ReleaseBlocks(leases):
                    self.tasks.append(self.release(leases))
                case _ if isinstance(message, EndReport):
                    instance.outbox.append(message)
                case _:
                    self.tasks.append(self.pass_on(instance, message))

    def pass_on(self, instance: Incarnation, message: Message) -> Steps:
        """Let a message reach another actor of the process; it may overtake others, and be overtaken."""
        yield
        if not instance.alive:
            return
        match message:
            case RunStage(attempt, stage):
                instance.queue.append((attempt, stage))
            case LoadInputs(attempt, source, target, _):
                self.tasks.append(self.load(instance, attempt, source, target))
            case StoreOutputs(attempt, _):
                self.tasks.append(self.store_outputs(instance, attempt))
            case SaveArtifact(attempt):
                self.tasks.append(self.save(instance, attempt))
            case CancelAttempt():
                pass  # whoever has it looks whether it is cancelled
            case _ if isinstance(message, EndReport):
                self.carry_out(instance, instance.attempts.end, message)

    def cancelled(self, instance: Incarnation, attempt: Attempt) -> bool:
        return instance.attempts.active[attempt].cancelled

    def deliver(self, instance: Incarnation) -> Steps:
        name = instance.name
        while instance.alive:
            yield
            if not instance.alive or not instance.outbox:
                continue
            match instance.outbox.pop(0):
                case stages.StageStarted(attempt, stage):
                    self.scheduler.started(attempt, name, Stage(stage), self.now)
                case stages.StageOutputsStored() as report:
                    self.scheduler.stored(name, report, self.now)
                case stages.StageFinished() as report:
                    self.scheduler.finished(name, report, self.now)
                case stages.StageFailed() as report:
                    self.scheduler.stage_failed(name, report, self.now)
                case stages.TransferFailed() as report:
                    self.scheduler.transfer_failed(name, report, self.now)
                case stages.StageCancelled(_, issued):
                    self.scheduler.registry.credit(name, issued)
                case stages.BlocksOffered(blocks):
                    self.scheduler.registry.offer(name, instance.generation, blocks)
            self.commit()

    def compute(self, instance: Incarnation) -> Steps:
        load = instance.attempts
        while instance.alive:
            yield
            if not instance.alive or not instance.queue:
                continue
            attempt, stage = instance.queue.pop(0)
            if self.cancelled(instance, attempt):
                self.tasks.append(self.pass_on(instance, load.stopped(attempt)))
                continue
            instance.outbox.append(load.started(attempt, stage, self.now))
            yield
            if instance.alive and instance.kind != "decoder" and instance.usual_nbytes:
                load.active[attempt].block = self.lease(instance, attempt, instance.usual_nbytes, instance.kind)
                yield
            if instance.alive:
                self.tasks.append(self.pass_on(instance, load.computed(attempt, 0.1, seed_independent=True)))

    def load(self, instance: Incarnation, attempt: Attempt, source: StoredPayload, target: LeaseRef | None) -> Steps:
        load, problem, source_gone = instance.attempts, "", False
        yield
        if instance.alive and self.find(source.lease) is None:
            problem, source_gone = "the source is gone", True
        elif instance.alive and target is not None:
            problem = self.pull(attempt, target)
            if not problem and self.choose.random() < self.damage:
                problem = "lost on the way"
                self.tables[target.pool].quarantine(target.lease_id, self.now + 0.1)
        yield
        if not instance.alive:
            return
        if target is not None:
            self.tasks.append(self.release((target,)))
        if problem:
            passed_on: Message = load.transfer_failed(attempt, problem, source_gone=source_gone)
        else:
            passed_on = load.loaded(attempt, self.now)
        self.tasks.append(self.pass_on(instance, passed_on))

    def pull(self, attempt: Attempt, target: LeaseRef) -> str:
        """As `BufferPool.pull` does."""
        lease = self.find(target)
        if lease is None or lease.state is not LeaseState.WRITING:
            assert (lease and lease.state is LeaseState.QUARANTINED) or self.generations[
                target.pool
            ] != target.pool_generation
            return "the target is gone"
        if not lease.request_id:
            self.tables[target.pool].assign(lease.id, attempt.job_id, attempt.number)
        elif (lease.request_id, lease.attempt) != (attempt.job_id, attempt.number):
            raise AssertionError(f"{attempt} was sent into a block of {lease.request_id}#{lease.attempt}")
        return ""

    def store_outputs(self, instance: Incarnation, attempt: Attempt) -> Steps:
        load = instance.attempts
        nbytes = self.sizes[(attempt.job_id.rpartition("/")[0], instance.kind)]
        yield
        if not instance.alive:
            return
        instance.usual_nbytes = nbytes
        item = load.active[attempt]
        lease, item.block = item.block, None
        if lease and (lease.nbytes != nbytes or not self.find(lease)):
            self.tasks.append(self.release((lease,)))
            lease = None
        while instance.alive:
            if self.cancelled(instance, attempt):
                unused = (lease,) if lease else ()
                self.tasks.append(self.release(unused))
                self.tasks.append(self.pass_on(instance, load.transfer_failed(attempt, "cancelled")))
                return
            lease = lease or self.lease(instance, attempt, nbytes, instance.kind)
            yield
            if lease and instance.alive and self.find(lease):
                self.tasks.append(self.seal(instance, lease, nbytes))
                stored = StoredPayload(lease, b"", 7, nbytes)
                self.tasks.append(self.pass_on(instance, load.stored(attempt, stored)))
                return
            lease = None

    def seal(self, instance: Incarnation, lease: LeaseRef, nbytes: int) -> Steps:
        """Seal a block that may be reported, used and released meanwhile."""
        yield
        found = self.find(lease) if instance.alive else None
        if found and found.state is LeaseState.WRITING:
            self.tables[lease.pool].seal(lease.lease_id, 7, nbytes)

    def save(self, instance: Incarnation, attempt: Attempt) -> Steps:
        yield
        if instance.alive:
            artifact = Artifact("x.png", "image/png", 1)
            self.tasks.append(self.pass_on(instance, instance.attempts.saved(attempt, artifact)))

    def replenish(self, instance: Incarnation) -> Steps:
        preallocated = instance.preallocated
        yield
        while instance.alive and preallocated.wanted and instance.pool != "pool":
            block = self.lease(instance, preallocated.next_attempt(), preallocated.nbytes, INCOMING)
            if block is None:
                break
            preallocated.add(block)
            yield
        self.offer(instance)

    def release_preallocated(self, instance: Incarnation) -> Steps:
        yield
        if instance.alive:
            blocks = instance.preallocated.clear()
            self.offer(instance)
            self.tasks.append(self.release(blocks))

    def offer(self, instance: Incarnation) -> None:
        blocks = tuple(instance.preallocated.blocks)
        instance.outbox.append(stages.BlocksOffered(blocks))

    def at_rest(self) -> None:
        """Nothing is left behind but what is kept on purpose."""
        self.scheduler.clear_cache()
        self.commit()
        for _ in range(10):
            for task in tuple(self.tasks):
                self.step(task)
        self.now += 1000
        self.reclaim()
        for table in self.tables.values():
            assert table.free + table.leased == table.capacity
            assert not [lease for lease in table.leases if lease.request_id]


class OvertakenError(Exception):
    """The work no longer counts."""


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    engine=st.sampled_from(["shm", "mooncake", "hosts"]),
    pages=st.integers(3, 48),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 2)),
    cached=st.sampled_from([0, 4, 2]),
    asked=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(1, 3), st.integers(0, 3)), max_size=14),
    blows=st.lists(st.tuples(st.sampled_from(["kill", "restart", "cancel"]), st.integers(0, 99)), max_size=5),
    damage=st.sampled_from([0.0, 0.1]),
)
def test_every_job_ends(
    seed: int,
    engine: str,
    pages: int,
    shape: tuple[int, int, int],
    cached: int,
    asked: list[tuple[float, float, int, int]],
    blows: list[tuple[str, int]],
    damage: float,
) -> None:
    count, slots, preallocated = shape
    cache = pages * PAGE // cached if cached else 0
    cluster = SimulatedCluster(
        random.Random(seed), pages=pages, engine=engine, count=count, slots=slots,
        preallocated=preallocated, cache=cache,
        damage=damage,
    )  # fmt: skip
    for number, (encoded, denoised, n, prompt) in enumerate(asked):
        sizes = [max(1, int(cluster.largest * share)) for share in (encoded, denoised)]
        if prompt:  # what is made of equal prompts is equal
            sizes[0] = max(1, cluster.largest >> prompt)
        cluster.submit(f"r{number}", *sizes, n=n, prompt=f"p{prompt}" if prompt else "")
    cluster.run([strike(cluster, *blow) for blow in blows])
    states = {request.state for request in cluster.scheduler.requests.values()}
    allowed = {State.DONE} | ({State.FAILED, State.CANCELLED} if blows or damage else set())
    assert states <= allowed, [request.view() for request in cluster.scheduler.requests.values()]
    assert sorted(cluster.notified) == sorted(cluster.scheduler.requests)
    cluster.at_rest()


def strike(cluster: SimulatedCluster, what: str, number: int) -> Any:
    def blow() -> None:
        if what == "kill":
            names = sorted(cluster.instances)
            cluster.kill(names[number % len(names)])
        elif what == "restart":
            names = sorted(cluster.tables)
            cluster.restart_pool(names[number % len(names)])
        elif ids := sorted(cluster.scheduler.requests):
            cluster.cancel(ids[number % len(ids)])

    return blow


@pytest.mark.parametrize("engine", ["shm", "mooncake", "hosts"])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_of_half_a_pool_and_prompts_of_mixed_lengths_do_not_lock_it_up(seed: int, engine: str) -> None:
    """Two denoisers of two slots whose outputs take all of their zone, among encoder outputs of three sizes."""
    cluster = SimulatedCluster(random.Random(seed), pages=128, engine=engine)
    for number in range(40):
        cluster.submit(f"r{number}", cluster.choose.choice([2, 4, 16]) * PAGE, cluster.largest)
    cluster.run([])
    assert {request.state for request in cluster.scheduler.requests.values()} == {State.DONE}
