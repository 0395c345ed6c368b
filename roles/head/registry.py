"""The registered instances and their credits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from triptych.engines.parameters.schema import Signature
from triptych.engines.stages import Stage
from triptych.roles.head.dispatch import Candidate
from triptych.roles.messages.common import LeaseRef
from triptych.roles.messages.requests import InstanceView
from triptych.roles.messages.stages import RegisterInstance

_STAGES: Final = {stage.value: stage for stage in Stage} | {"monolithic": Stage.ENCODER}


class ExitCause(StrEnum):
    """How an instance ended: says whether its jobs may be the cause."""

    CRASHED = "its process ended"
    """It crashed or was killed; the job that it computed may be the cause."""
    STALLED = "its process was ended after a silence"
    """It sent no heartbeats any more, as when the machine or the process was stopped."""
    STOPPED = "it was asked to end"
    """Its jobs are not the cause."""


@dataclass(slots=True)
class InstanceRecord:
    """One incarnation of a role process."""

    name: str
    kind: str
    generation: int
    slots: int
    pool: str
    issued: int
    """Credits that it has issued; never decreases."""
    spent: int
    """Credits that the head has used."""
    signature: Signature
    model: str = ""
    """Version of its weights."""
    last_served: int = 0
    """Serial number of the last assignment to it, 0 for never."""
    preallocated: list[LeaseRef] = field(default_factory=list)
    """Blocks of its pool that it has preallocated for pushes."""
    preallocated_taken: set[LeaseRef] = field(default_factory=set)
    """Those used for a push, until an offer lacks them: earlier offers were sent before the push was read."""
    draining: bool = False
    """Whether it finishes its attempts and takes no more."""
    leaving: bool = False
    """Whether it has reported that it was asked to end."""
    trouble: str = ""
    """A problem that its work waits for and that an operator may have to solve; a sentence."""
    awake: bool = True
    """Whether its weights are in memory."""
    changing_to: str = ""
    """"sleep" or "wake" while that is under way, else ""."""
    device: str = "cpu"
    max_batch: int = 1
    """Most jobs whose denoising steps it computes in one call."""
    stores_checkpoints: bool = False
    """Whether another instance can go on with what it has begun."""
    weights: int = 0
    """Bytes of its weights; 0 until it has loaded them once."""
    wake_error: str = ""
    """Why it failed to wake the last time; a sentence, or ""."""
    silent_s: float = 0.0
    """Seconds since its last heartbeat, without those in which the head could not receive one."""

    @property
    def credits(self) -> int:
        """Number of jobs that it would still take."""
        return self.issued - self.spent

    @property
    def takes_jobs(self) -> bool:
        """Whether it takes jobs as far as it has credits."""
        return not self.draining and self.awake and not self.changing_to

    @property
    def problem(self) -> str:
        """A problem that an operator may have to solve; a sentence, or ""."""
        return self.trouble or self.wake_error

    @property
    def has_weights(self) -> bool:
        """Whether its weights are on its device, or are being loaded."""
        return self.awake or self.changing_to == "wake"

    def end(self, stalled_after_s: float) -> ExitCause:
        """Return how it ended, when its connection is lost."""
        if self.leaving:
            return ExitCause.STOPPED
        return ExitCause.STALLED if self.silent_s >= stalled_after_s else ExitCause.CRASHED

    def serves(self, stage: Stage) -> bool:
        """Return whether it takes jobs at `stage`."""
        return _STAGES.get(self.kind) is stage

    @property
    def stage(self) -> Stage | None:
        """The stage at which it takes jobs. A monolithic instance takes a job at its first stage, for all."""
        return _STAGES.get(self.kind)

    def candidate(self, load: int) -> Candidate:
        """Return it as dispatch policies see it; `load` is the number of jobs that are assigned to it."""
        return Candidate(self.name, self.credits, self.slots, load, self.last_served, self.model, self.pool)

    def view(self, running: Iterable[str]) -> InstanceView:
        """Return what `/v1/cluster` shows, with the ids of the jobs that are assigned to it."""
        return InstanceView(
            self.name,
            self.kind,
            self.generation,
            self.credits,
            self.slots,
            tuple(sorted(running)),
            self.problem,
            self.awake,
            self.weights,
        )


class InstanceRegistry:
    """The instances by name, and the incarnations that are fenced."""

    def __init__(self, configured: Mapping[Stage, int] | None = None) -> None:
        self.configured = dict(configured or {})
        """Slots of all instances of the topology, by stage."""
        self.instances: dict[str, InstanceRecord] = {}
        self.pools_away: set[str] = set()
        """Pools that have ended and are not back: instances that use one of them get no jobs."""
        self.changed: set[str] = set()
        """Names of instances that may have come, gone or changed since somebody has looked."""
        self.version = 0
        """Counts changes other than those of credits and load."""
        self._slots: Counter[Stage | None] = Counter()
        """Slots of the registered instances, by stage."""
        self._kinds: Counter[str] = Counter()
        """Number of registered instances of each kind."""
        self._fenced: dict[str, int] = {}
        self._turns = 0

    def note_change(self, name: str) -> None:
        """Note that an instance has come or gone, or takes other jobs than before."""
        self.changed.add(name)
        self.version += 1

    def register(self, registration: RegisterInstance) -> InstanceRecord:
        """Add an incarnation, in place of an earlier one of that name."""
        known = self.instances.get(registration.name)
        instance = InstanceRecord(
            name=registration.name,
            kind=registration.kind,
            generation=registration.generation,
            slots=registration.slots,
            pool=registration.pool,
            issued=registration.issued,
            spent=registration.taken,
            signature=registration.signature,
            model=registration.model,
            last_served=known.last_served if known else 0,
            draining=registration.leaving,
            leaving=registration.leaving,
            awake=registration.awake,
            device=registration.device,
            max_batch=max(1, registration.max_batch),
            stores_checkpoints=registration.stores_checkpoints,
            weights=registration.weights,
        )
        self.remove(registration.name)
        self.instances[registration.name] = instance
        self._slots[instance.stage] += instance.slots
        self._kinds[instance.kind] += 1
        return instance

    def generation(self, name: str) -> int:
        """Return the generation of the present incarnation of that name, 0 when there is none."""
        instance = self.instances.get(name)
        return instance.generation if instance else 0

    def incarnation(self, name: str, generation: int) -> InstanceRecord | None:
        """Return the instance of that name, or None if it has another generation."""
        instance = self.instances.get(name)
        return instance if instance and instance.generation == generation else None

    def fenced(self, name: str, generation: int) -> bool:
        """Return whether this incarnation is fenced, so that its messages are refused."""
        return generation <= self._fenced.get(name, 0)

    def fence(self, name: str, generation: int) -> None:
        """Refuse an incarnation, and earlier ones, from now on."""
        self._fenced[name] = max(generation, self._fenced.get(name, 0))

    def remove(self, name: str) -> InstanceRecord | None:
        """Remove an instance that has ended."""
        self.note_change(name)
        if instance := self.instances.pop(name, None):
            self._slots[instance.stage] -= instance.slots
            self._kinds[instance.kind] -= 1
        return instance

    def credit(self, name: str, issued: int) -> None:
        """Record the credits that an instance has issued; a smaller number than before changes nothing."""
        if instance := self.instances.get(name):
            instance.issued = max(instance.issued, issued)
            self.changed.add(name)

    def takes_jobs(self, instance: InstanceRecord) -> bool:
        """Return whether an instance would take a job for its stage now."""
        return instance.credits > 0 and instance.takes_jobs and instance.pool not in self.pools_away

    def set_pool_away(self, pool: str, *, away: bool) -> None:
        """Record that a pool has ended, or is back."""
        (self.pools_away.add if away else self.pools_away.discard)(pool)
        for instance in self.instances.values():
            if instance.pool == pool:
                self.note_change(instance.name)

    def charge(self, name: str) -> None:
        """Spend one credit of an instance, for a job that is assigned to it."""
        instance = self.instances[name]
        self._turns += 1
        instance.spent += 1
        instance.last_served = self._turns
        self.changed.add(name)

    def refund(self, name: str, generation: int) -> None:
        """Return the credit of an attempt that an incarnation did not take; a later incarnation was never charged."""
        if instance := self.incarnation(name, generation):
            instance.spent -= 1
            self.changed.add(name)

    def offer(self, name: str, generation: int, blocks: Iterable[LeaseRef]) -> None:
        """Record the preallocated blocks of an instance."""
        if instance := self.incarnation(name, generation):
            offered = tuple(blocks)
            instance.preallocated_taken.intersection_update(offered)
            instance.preallocated = [block for block in offered if block not in instance.preallocated_taken]

    def needs_block(self, name: str, source: LeaseRef) -> bool:
        """Return whether stored outputs must be copied to the instance's own pool before it can read them."""
        instance = self.instances.get(name)
        return instance is not None and instance.pool != source.pool

    def take_preallocated(self, name: str, nbytes: int) -> LeaseRef | None:
        """Take a preallocated block of an instance; return None if none is large enough."""
        instance = self.instances.get(name)
        fitting = next((block for block in instance.preallocated if block.nbytes >= nbytes), None) if instance else None
        if instance and fitting:
            instance.preallocated.remove(fitting)
            instance.preallocated_taken.add(fitting)
        return fitting

    def drain(self, name: str) -> None:
        """Assign no more jobs to this incarnation of an instance."""
        if instance := self.instances.get(name):
            instance.draining = True
            self.note_change(name)

    def leave(self, name: str, generation: int) -> None:
        """Note that an incarnation was asked to end: assign it no more jobs, and do not count its end as a crash."""
        if instance := self.incarnation(name, generation):
            instance.draining = instance.leaving = True
            self.note_change(name)

    def heard(self, name: str, generation: int, trouble: str = "") -> bool:
        """Record a heartbeat; return False when that incarnation is not registered."""
        instance = self.incarnation(name, generation)
        if instance:
            instance.silent_s = 0.0
            instance.trouble = trouble
        return instance is not None

    def slots(self, stage: Stage) -> int:
        """Return the slots of all registered instances of `stage`."""
        return self._slots[stage]

    def silent(self, listened_s: float, timeout_s: float) -> list[InstanceRecord]:
        """Add `listened_s` to the silence of every instance; return those silent for longer than `timeout_s`."""
        for instance in self.instances.values():
            instance.silent_s += listened_s
        return [instance for instance in self.instances.values() if instance.silent_s > timeout_s]

    def missing_stages(self, without: Collection[str] = ()) -> list[str]:
        """Return the stages without a registered instance, not counting those whose pools are in `without`."""
        kinds = Counter(i.kind for i in self.instances.values() if i.pool not in without) if without else self._kinds
        return [] if kinds["monolithic"] else [stage.value for stage in Stage if not kinds[stage.value]]
