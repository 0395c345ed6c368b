"""Every job ends, whatever the sizes of what it hands on and however little memory there is.

The real lease tables, ledger, staging, spares and workloads; what their actors do is steps of tasks that run in any
order. Where something was struck a job may fail, but nothing may wait for ever.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.roles.books import KINDS, SIGNATURE, ledger, request
from triptych.engines.buddy import PAGE
from triptych.engines.leases import Lease, LeaseError, LeaseState, LeaseTable
from triptych.engines.panels import Panel
from triptych.roles import workload_effects as do
from triptych.roles.effects import Assign, Cancel, Release, Settle
from triptych.roles.fleet import Fleet
from triptych.roles.ledger import Ledger
from triptych.roles.messages import stages
from triptych.roles.messages.stages import InstanceHello, StageAssign, TransferPush
from triptych.roles.messages.work import Artifact, LeaseRef, Output, Staged, Work
from triptych.roles.pool import INCOMING, zones
from triptych.roles.request import UPSTREAM, State, Unit
from triptych.roles.spares import Spares
from triptych.roles.workload import NotTaken, Workload

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
    workload: Workload
    spares: Spares
    pool: str
    alive: bool = True
    queue: list[tuple[Work, Panel]] = field(default_factory=list)
    """What the stream worker has to compute, in order."""
    stopped: set[Work] = field(default_factory=set)
    outbox: list[Any] = field(default_factory=list)
    """To the head, in order."""


class Cluster:
    """The parts that decide, and tasks in place of their actors."""

    def __init__(
        self,
        choose: random.Random,
        *,
        pages: int,
        engine: str = "shm",
        count: int = 2,
        slots: int = 2,
        spares: int = 2,
        cache: int = 0,
        damage: float = 0.0,
    ) -> None:
        self.choose = choose
        self.capacity = pages * PAGE
        self.largest = 1 << (self.capacity // 2).bit_length() >> 1
        self.engine, self.spares, self.damage = engine, spares, damage
        self.slots = slots
        self.now = 0.0
        self.generation = 1
        self.tasks: list[Steps] = []
        self.sizes: dict[tuple[str, str], int] = {}
        self.books: Ledger = ledger(cache=cache, max_attempts=1000, max_pending=1000)
        self.books.fleet = Fleet(dict.fromkeys(Panel, count * slots))
        self.tables: dict[str, LeaseTable] = {}
        self.generations: dict[str, int] = {}
        self.instances: dict[str, Incarnation] = {}
        self.settled: list[str] = []
        for kind in KINDS:
            self.open_pool(self.pool_of(kind))
        for kind in KINDS:
            for k in range(count):
                self.join(f"{kind}-{k}")

    # -- what comes from outside

    def submit(self, id_: str, encoded: int, denoised: int, *, n: int = 1, prompt: str = "") -> None:
        self.sizes[(id_, "encoder")], self.sizes[(id_, "denoiser")] = encoded, denoised
        self.books.accept(request(id_, n, deadline=FAR, at=self.now, prompt=prompt or id_), self.now)
        self.settle()

    def cancel(self, id_: str) -> None:
        self.books.cancel(id_, "by the test", self.now)
        self.settle()

    def kill(self, name: str) -> None:
        """End an instance; its successor comes at once."""
        dead = self.instances.pop(name)
        dead.alive = False
        for table in self.tables.values():
            table.reclaim_owner(name, dead.generation + 1)
        self.books.instance_down(name, "killed", self.now)
        self.settle()
        self.join(name)

    def restart_pool(self, pool: str) -> None:
        self.open_pool(pool)
        self.books.pool_down(pool, self.generation, self.now)
        self.settle()

    # -- the loop

    def run(self, blows: list[Any]) -> None:
        """Run every task to its end, in any order at first, and strike in between."""
        for blow in blows:
            for _ in range(self.choose.randrange(60)):
                if self.tasks:
                    self.step(self.choose.choice(self.tasks))
            blow()
        since = 0
        while self.books.units:
            before = self.progress()
            self.now += 0.02
            for task in tuple(self.tasks):
                self.step(task)
            self.choose.shuffle(self.tasks)
            self.reclaim()
            since = since + 1 if self.progress() == before else 0
            assert since < ROUNDS, f"stalled: {self.picture()}"
        while any(i.workload.items for i in self.instances.values()):
            for task in tuple(self.tasks):
                self.step(task)

    def progress(self) -> object:
        return [(u.id, u.state, u.attempt) for u in self.books.units.values()]

    def picture(self) -> str:
        units = [(u.id, u.state.value, u.instance) for u in self.books.units.values()]
        leases = [
            (pool, lease.zone, lease.state.value, lease.request_id, lease.offset // PAGE, lease.capacity // PAGE)
            for pool, table in self.tables.items()
            for lease in table.leases
        ]
        return f"{units} {leases}"

    def step(self, task: Steps) -> None:
        try:
            next(task)
        except StopIteration:
            self.tasks.remove(task)

    def settle(self) -> None:
        self.books.dispatch(self.now)
        for effect in self.books.take_effects():
            match effect:
                case Assign(name, unit_id):
                    unit = self.books.units[unit_id]
                    self.tasks.append(self.assign(name, unit, unit.work))
                case Cancel(name, work, _):
                    self.tasks.append(self.stop(name, work))
                case Release(leases):
                    self.tasks.append(self.release(leases))
                case Settle(id_):
                    self.settled.append(id_)

    # -- the head's tasks

    def assign(self, name: str, unit: Unit, work: Work) -> Steps:
        yield
        refused = None
        try:
            yield from self.send(name, unit, work)
        except NotTaken as reason:
            refused = reason.code
        except OvertakenError:
            self.books.fleet.refund(name)
        if refused:
            self.books.not_taken(name, work, refused, refused, self.now)
        self.settle()

    def send(self, name: str, unit: Unit, work: Work) -> Steps:
        instance = self.instances[name]
        if unit.work != work or unit.instance != name:
            raise OvertakenError
        panel = unit.panel
        if panel is Panel.ENCODER:
            yield
            message = StageAssign(work, {}, unit.seed, Output("png"), FAR)
            self.carry_out(instance, instance.workload.assign, message, self.now)
            return
        assert panel is not None
        if UPSTREAM[panel] not in unit.staged:
            raise NotTaken("cancelled", "its staged tensors are gone")
        source, target = unit.staged[UPSTREAM[panel]], None
        if instance.pool != source.lease.pool:
            target = self.books.fleet.take_spare(name, source.nbytes)
            while target is None:
                yield
                target = self.allocate(instance, work, source.nbytes)
                if target is None and (unit.work != work or unit.instance != name):
                    raise OvertakenError
        yield
        push = TransferPush(work, source, target, Output("png"), FAR)
        spare = instance.spares.use(target)
        self.tasks.append(self.replenish(instance))
        try:
            self.carry_out(instance, instance.workload.push, push, self.now, spare=spare)
        except NotTaken:
            if spare and target:
                self.tasks.append(self.release((target,)))
            raise

    def allocate(self, instance: Incarnation, work: Work, nbytes: int) -> LeaseRef | None:
        if not instance.alive or not instance.workload.can_reserve(work):
            return None
        target = self.lease(instance, work, nbytes, INCOMING)
        if target is None:
            return None
        try:
            self.carry_out(instance, instance.workload.reserve, work, target)
        except NotTaken:
            self.tasks.append(self.release((target,)))
            raise
        self.tasks.append(self.release(instance.spares.learn(nbytes)))
        self.tasks.append(self.replenish(instance))
        return target

    def stop(self, name: str, work: Work) -> Steps:
        yield
        if instance := self.instances.get(name):
            self.carry_out(instance, instance.workload.cancel, work)

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
                unit = self.books.units.get(lease.request_id)
                if not self.books.staging.holds(reference) and (unit is None or lease.attempt < unit.attempt):
                    table.release(lease.id)

    def room(self, pool: str, nbytes: int) -> Steps:
        yield
        self.books.room_wanted(pool, nbytes)
        self.settle()

    # -- the pools

    def pool_of(self, kind: str) -> str:
        return "pool" if self.engine == "shm" else f"pool-{kind}"

    def open_pool(self, pool: str) -> None:
        self.generation += 1
        table = LeaseTable(self.capacity, generation=self.generation, zones=zones(self.capacity, pool=pool))
        self.tables[pool], self.generations[pool] = table, self.generation

    def lease(self, owner: Incarnation, work: Work, nbytes: int, zone: str) -> LeaseRef | None:
        """As `BufferPool.lease` does."""
        table = self.tables[owner.pool]
        assert nbytes <= min(table.largest_block(zone), self.largest), "it was said to fit"
        lease = table.lease(
            owner.name, owner.generation, work.unit_id, work.attempt, nbytes, zone, now=self.now
        )  # fmt: skip
        if lease:
            return self.refer(owner.pool, lease)
        if (wanted := table.first_wanted(zone)) and zone == "encoder":
            self.tasks.append(self.room(owner.pool, wanted))
        elif wanted:
            for spare in table.in_state(LeaseState.WRITING):
                if not spare.request_id and spare.zone == zone:
                    self.tasks.append(self.give_spares_back(self.instances[spare.owner]))
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
        workload = Workload(name, kind, self.slots)
        instance = Incarnation(
            name, kind, self.generation, workload, Spares(0 if kind == "encoder" else self.spares), self.pool_of(kind)
        )
        self.instances[name] = instance
        message = InstanceHello(
            name, kind, self.generation, 1, self.slots, self.slots, 0, instance.pool, SIGNATURE, ()
        )  # fmt: skip
        self.books.hello(message, self.now)
        self.tasks += [self.deliver(instance), self.compute(instance)]
        self.settle()

    def carry_out(
        self, instance: Incarnation, decide: Callable[..., tuple[do.Effect, ...]], *args: Any, **kwargs: Any
    ) -> None:
        if not instance.alive:
            raise OvertakenError
        for effect in decide(*args, **kwargs):
            match effect:
                case do.Report(message):
                    instance.outbox.append(message)
                case do.Release(lease):
                    self.tasks.append(self.release((lease,)))
                case do.Run(work, panel):
                    instance.queue.append((work, panel))
                case do.Load(work, source, target, _):
                    self.tasks.append(self.load(instance, work, source, target))
                case do.Stage(work, _):
                    self.tasks.append(self.stage(instance, work))
                case do.Save(work):
                    self.tasks.append(self.save(instance, work))
                case do.StopPanel(work) | do.StopTransfer(work):
                    instance.stopped.add(work)

    def deliver(self, instance: Incarnation) -> Steps:
        while instance.alive:
            yield
            if not instance.alive or not instance.outbox:
                continue
            match instance.outbox.pop(0):
                case stages.StageStarted(work, name, panel):
                    self.books.started(work, name, Panel(panel), self.now)
                case stages.TransferStaged() as report:
                    self.books.staged(report, self.now)
                case stages.StageFinished() as report:
                    self.books.finished(report, self.now)
                case stages.StageFailed() as report:
                    self.books.stage_failed(report, self.now)
                case stages.TransferFailed() as report:
                    self.books.transfer_failed(report, self.now)
                case stages.StageCancelled(_, name, issued):
                    self.books.fleet.credit(name, issued)
                case stages.SlotsOffered(name, generation, slots):
                    self.books.fleet.offer(name, generation, slots)
            self.settle()

    def compute(self, instance: Incarnation) -> Steps:
        load = instance.workload
        while instance.alive:
            yield
            if not instance.alive or not instance.queue:
                continue
            work, panel = instance.queue.pop(0)
            if work not in instance.stopped:
                self.carry_out(instance, load.panel_started, work, panel, self.now)
            yield
            if not instance.alive:
                return
            if work in instance.stopped:
                self.carry_out(instance, load.panel_cancelled, work)
            else:
                self.carry_out(instance, load.panel_finished, work, 0.1, seedless=True)

    def load(self, instance: Incarnation, work: Work, source: Staged, target: LeaseRef | None) -> Steps:
        load, problem, source_gone = instance.workload, "", False
        yield
        if instance.alive and self.find(source.lease) is None:
            problem, source_gone = "the source is gone", True
        elif instance.alive and target is not None:
            problem = self.pull(work, target)
            if not problem and self.choose.random() < self.damage:
                problem = "lost on the way"
                self.tables[target.pool].quarantine(target.lease_id, self.now + 0.1)
        yield
        if not instance.alive:
            return
        if target is not None:
            self.tasks.append(self.release((target,)))
        if problem or work in instance.stopped:
            self.carry_out(instance, load.state_failed, work, problem, source_gone=source_gone, retryable=True)
        else:
            self.carry_out(instance, load.state_loaded, work, 0.1)

    def pull(self, work: Work, target: LeaseRef) -> str:
        """As `BufferPool.pull` does."""
        lease = self.find(target)
        if lease is None or lease.state is not LeaseState.WRITING:
            assert (lease and lease.state is LeaseState.QUARANTINED) or self.generations[
                target.pool
            ] != target.pool_generation
            return "the target is gone"
        if not lease.request_id:
            self.tables[target.pool].assign(lease.id, work.unit_id, work.attempt)
        elif (lease.request_id, lease.attempt) != (work.unit_id, work.attempt):
            raise AssertionError(f"{work} was sent into a slot of {lease.request_id}#{lease.attempt}")
        return ""

    def stage(self, instance: Incarnation, work: Work) -> Steps:
        load = instance.workload
        nbytes = self.sizes[(work.unit_id.rpartition("/")[0], instance.kind)]
        yield
        while instance.alive:
            if work in instance.stopped:
                self.carry_out(instance, load.state_failed, work, "cancelled", source_gone=False, retryable=True)
                return
            lease = self.lease(instance, work, nbytes, instance.kind)
            yield
            if lease and instance.alive and self.find(lease):
                self.tables[lease.pool].seal(lease.lease_id, 7, nbytes)
                staged = Staged(lease, b"", 7, nbytes)
                yield
                if instance.alive:
                    self.carry_out(instance, load.state_staged, work, staged)
                return

    def save(self, instance: Incarnation, work: Work) -> Steps:
        yield
        if instance.alive:
            artifact = Artifact("x.png", "image/png", 1)
            self.carry_out(instance, instance.workload.artifact_saved, work, artifact)

    def replenish(self, instance: Incarnation) -> Steps:
        spares = instance.spares
        yield
        while instance.alive and spares.wanted and instance.pool != "pool":
            slot = self.lease(instance, spares.next_work(), spares.nbytes, INCOMING)
            if slot is None:
                break
            spares.add(slot)
            yield
        self.offer(instance)

    def give_spares_back(self, instance: Incarnation) -> Steps:
        yield
        if instance.alive:
            slots = instance.spares.clear()
            self.offer(instance)
            self.tasks.append(self.release(slots))

    def offer(self, instance: Incarnation) -> None:
        slots = tuple(instance.spares.slots)
        instance.outbox.append(stages.SlotsOffered(instance.name, instance.generation, slots))

    def at_rest(self) -> None:
        """Nothing is left behind but what is kept on purpose."""
        self.books.clear_cache()
        self.settle()
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
    engine=st.sampled_from(["shm", "mooncake"]),
    pages=st.integers(2, 48),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(0, 2)),
    cached=st.sampled_from([0, 4, 2]),
    jobs=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.integers(1, 3), st.integers(0, 3)), max_size=14),
    blows=st.lists(st.tuples(st.sampled_from(["kill", "restart", "cancel"]), st.integers(0, 99)), max_size=5),
    damage=st.sampled_from([0.0, 0.1]),
)
def test_every_job_ends(
    seed: int,
    engine: str,
    pages: int,
    shape: tuple[int, int, int],
    cached: int,
    jobs: list[tuple[float, float, int, int]],
    blows: list[tuple[str, int]],
    damage: float,
) -> None:
    count, slots, spares = shape
    cache = pages * PAGE // cached if cached else 0
    cluster = Cluster(
        random.Random(seed), pages=pages, engine=engine, count=count, slots=slots, spares=spares, cache=cache,
        damage=damage,
    )  # fmt: skip
    for number, (encoded, denoised, n, prompt) in enumerate(jobs):
        sizes = [max(1, int(cluster.largest * share)) for share in (encoded, denoised)]
        if prompt:  # what is made of equal prompts is equal
            sizes[0] = max(1, cluster.largest >> prompt)
        cluster.submit(f"r{number}", *sizes, n=n, prompt=f"p{prompt}" if prompt else "")
    cluster.run([strike(cluster, *blow) for blow in blows])
    states = {request.state for request in cluster.books.requests.values()}
    allowed = {State.DONE} | ({State.FAILED, State.CANCELLED} if blows or damage else set())
    assert states <= allowed, [request.view() for request in cluster.books.requests.values()]
    assert sorted(cluster.settled) == sorted(cluster.books.requests)
    cluster.at_rest()


def strike(cluster: Cluster, what: str, number: int) -> Any:
    def blow() -> None:
        if what == "kill":
            names = sorted(cluster.instances)
            cluster.kill(names[number % len(names)])
        elif what == "restart":
            names = sorted(cluster.tables)
            cluster.restart_pool(names[number % len(names)])
        elif ids := sorted(cluster.books.requests):
            cluster.cancel(ids[number % len(ids)])

    return blow


@pytest.mark.parametrize("engine", ["shm", "mooncake"])
@pytest.mark.parametrize("seed", range(3))
def test_outputs_of_half_a_pool_and_prompts_of_mixed_lengths_do_not_lock_it_up(seed: int, engine: str) -> None:
    """Two denoisers of two slots whose outputs take half of the pool, among encoder outputs of three sizes."""
    cluster = Cluster(random.Random(seed), pages=128, engine=engine)
    for number in range(40):
        cluster.submit(f"r{number}", cluster.choose.choice([2, 4, 16]) * PAGE, 64 * PAGE)
    cluster.run([])
    assert {request.state for request in cluster.books.requests.values()} == {State.DONE}
