"""The role instances that the head may send work to, and their credits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from triptych.engines.parameters.schema import Signature
from triptych.engines.stages import Stage
from triptych.roles.head.dispatch import Candidate
from triptych.roles.messages.common import LeaseRef
from triptych.roles.messages.requests import InstanceView
from triptych.roles.messages.stages import RegisterInstance


class ExitKind(StrEnum):
    """How an instance came to its end, as far as its work is concerned."""

    CRASHED = "its process ended"
    """By itself, or by a signal of somebody else's: what it computed may be why."""
    STALLED = "its process was ended after a silence"
    """It was not heard of any more, as when the machine, or the process, was stopped."""
    STOPPED = "it was asked to end"
    """Its work is not why."""


@dataclass(slots=True)
class InstanceRecord:
    """One incarnation of a role process."""

    name: str
    kind: str
    generation: int
    slots: int
    pool: str
    issued: int
    """Credits that it has issued; only ever grows."""
    spent: int
    """Credits that the head has used."""
    signature: Signature
    model: str = ""
    """Version of its weights."""
    last_served: int = 0
    """Serial number of the last assignment to it, 0 for never."""
    preallocated: list[LeaseRef] = field(default_factory=list)
    """Blocks of its pool that it keeps ready for what is pushed to it."""
    preallocated_taken: set[LeaseRef] = field(default_factory=set)
    """Those that something was pushed into, until an offer lacks them: before, the push may not have been read."""
    draining: bool = False
    """It finishes what is assigned to it and takes nothing more."""
    leaving: bool = False
    """It was asked to end, and has said so."""
    trouble: str = ""
    """What its work waits for that a person may have to mend; a sentence."""
    awake: bool = True
    """Its weights are in memory."""
    changing_to: str = ""
    """"sleep" or "wake" while it is on its way to that."""
    device: str = "cpu"
    weights: int = 0
    """Bytes of its weights, 0 where it has never loaded them."""
    wake_error: str = ""
    """Why it could not be woken when it was last told to; a sentence."""
    silent_s: float = 0.0
    """Seconds since its last sign of life, of those in which the head could have heard it."""

    @property
    def credits(self) -> int:
        """Jobs that it would still take."""
        return self.issued - self.spent

    @property
    def problem(self) -> str:
        """What a person may have to mend for it to work."""
        return self.trouble or self.wake_error

    @property
    def holds(self) -> bool:
        """Whether its device has its weights, or is about to."""
        return self.awake or self.changing_to == "wake"

    def end(self, stalled_after_s: float) -> ExitKind:
        """What the loss of its connection means."""
        if self.leaving:
            return ExitKind.STOPPED
        return ExitKind.STALLED if self.silent_s >= stalled_after_s else ExitKind.CRASHED

    def serves(self, stage: Stage) -> bool:
        """Whether work for `stage` starts here. A monolithic instance takes a job at its first stage, for all."""
        return self.kind == stage.value or (self.kind == "monolithic" and stage is Stage.ENCODER)

    def view(self, running: Iterable[str]) -> InstanceView:
        """What `/v1/cluster` shows, with the ids of the jobs that are assigned to it."""
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
    """The instances by name, and those that were given up."""

    def __init__(self, configured: Mapping[Stage, int] | None = None) -> None:
        self.configured = dict(configured or {})
        """jobs that all instances of the topology can hold together, by stage."""
        self.instances: dict[str, InstanceRecord] = {}
        self._fenced: dict[str, int] = {}
        self._turns = 0

    def register(self, registration: RegisterInstance) -> InstanceRecord:
        """Enter an incarnation, in place of any earlier one of that name."""
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
            weights=registration.weights,
        )
        self.instances[registration.name] = instance
        return instance

    def generation(self, name: str) -> int:
        """Number of the present incarnation of that name, 0 when there is none."""
        instance = self.instances.get(name)
        return instance.generation if instance else 0

    def incarnation(self, name: str, generation: int) -> InstanceRecord | None:
        """The instance of that name, unless it is another incarnation of it."""
        instance = self.instances.get(name)
        return instance if instance and instance.generation == generation else None

    def fenced(self, name: str, generation: int) -> bool:
        """Whether this incarnation was given up, so that nothing it says counts."""
        return generation <= self._fenced.get(name, 0)

    def fence(self, name: str, generation: int) -> None:
        """Give an incarnation up for good."""
        self._fenced[name] = max(generation, self._fenced.get(name, 0))

    def remove(self, name: str) -> InstanceRecord | None:
        """Forget an instance that is gone."""
        return self.instances.pop(name, None)

    def credit(self, name: str, issued: int) -> None:
        """Take note of credits; an older number than one already seen changes nothing."""
        if instance := self.instances.get(name):
            instance.issued = max(instance.issued, issued)

    def candidates(self, stage: Stage, load: Mapping[str, int]) -> list[Candidate]:
        """Return the instances that would take a job for `stage` now; `load` is how many each has, by name."""
        return [
            Candidate(i.name, i.credits, i.slots, load.get(i.name, 0), i.last_served, i.model)
            for i in self.instances.values()
            if i.credits > 0 and not i.draining and i.awake and not i.changing_to and i.serves(stage)
        ]

    def charge(self, name: str) -> None:
        """Spend one credit of an instance, for a job that is assigned to it."""
        instance = self.instances[name]
        self._turns += 1
        instance.spent += 1
        instance.last_served = self._turns

    def refund(self, name: str, generation: int) -> None:
        """Give an incarnation back the credit of an attempt that it did not take; a later one was never charged."""
        if instance := self.incarnation(name, generation):
            instance.spent -= 1

    def offer(self, name: str, generation: int, blocks: Iterable[LeaseRef]) -> None:
        """Take note of the blocks that an instance keeps ready."""
        if instance := self.incarnation(name, generation):
            offered = tuple(blocks)
            instance.preallocated_taken.intersection_update(offered)
            instance.preallocated = [block for block in offered if block not in instance.preallocated_taken]

    def needs_block(self, name: str, source: LeaseRef) -> bool:
        """Whether stored outputs have to be copied to a block of the instance's own pool before it can read them."""
        instance = self.instances.get(name)
        return instance is not None and instance.pool != source.pool

    def take_preallocated(self, name: str, nbytes: int) -> LeaseRef | None:
        """Use up a block that an instance keeps ready, if one is large enough."""
        instance = self.instances.get(name)
        fitting = next((block for block in instance.preallocated if block.nbytes >= nbytes), None) if instance else None
        if instance and fitting:
            instance.preallocated.remove(fitting)
            instance.preallocated_taken.add(fitting)
        return fitting

    def drain(self, name: str) -> None:
        """Send it nothing more; a later incarnation starts anew."""
        if instance := self.instances.get(name):
            instance.draining = True

    def leave(self, name: str, generation: int) -> None:
        """An incarnation has been asked to end: send it nothing more, and do not take its end for a crash."""
        if instance := self.incarnation(name, generation):
            instance.draining = instance.leaving = True

    def heard(self, name: str, generation: int, trouble: str = "") -> bool:
        """Take note of a sign of life; False when that incarnation is not here."""
        instance = self.incarnation(name, generation)
        if instance:
            instance.silent_s = 0.0
            instance.trouble = trouble
        return instance is not None

    def slots(self, stage: Stage) -> int:
        """Jobs that the instances of `stage` can hold together."""
        return sum(i.slots for i in self.instances.values() if i.serves(stage))

    def silent(self, listened_s: float, timeout_s: float) -> list[InstanceRecord]:
        """Instances that have been silent for longer than `timeout_s`, now that `listened_s` more have passed."""
        for instance in self.instances.values():
            instance.silent_s += listened_s
        return [instance for instance in self.instances.values() if instance.silent_s > timeout_s]

    def missing_stages(self) -> list[str]:
        """Stages that nobody serves at present."""
        if any(i.kind == "monolithic" for i in self.instances.values()):
            return []
        return [p.value for p in Stage if not any(i.serves(p) for i in self.instances.values())]
