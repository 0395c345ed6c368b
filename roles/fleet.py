"""The role instances that the head may send work to, and their credits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from triptych.engines.panels import Panel
from triptych.engines.parameters import Signature
from triptych.roles.dispatch import Candidate
from triptych.roles.messages.requests import InstanceView
from triptych.roles.messages.stages import InstanceHello
from triptych.roles.messages.work import LeaseRef


class End(StrEnum):
    """How an instance came to its end, as far as its work is concerned."""

    CRASHED = "its process ended"
    """By itself, or by a signal of somebody else's: what it computed may be why."""
    STALLED = "its process was ended after a silence"
    """It was not heard of any more, as when the machine, or the process, was stopped."""
    LEFT = "it was asked to end"
    """Its work is not why."""


@dataclass(slots=True)
class Instance:
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
    in_hand: set[str] = field(default_factory=set)
    """Ids of the units assigned to it."""
    served: int = 0
    last_served: int = 0
    spares: list[LeaseRef] = field(default_factory=list)
    """Slots of its pool that it keeps ready for what is pushed to it."""
    spares_taken: set[LeaseRef] = field(default_factory=set)
    """Those that something was pushed into, until an offer lacks them: before, the push may not have been read."""
    draining: bool = False
    """It finishes what it has in hand and takes nothing more."""
    leaving: bool = False
    """It was asked to end, and has said so."""
    trouble: str = ""
    """What its work waits for that a person may have to mend; a sentence."""
    awake: bool = True
    """Its weights are in memory."""
    told: str = ""
    """"sleep" or "wake" while it is on its way to that."""
    device: str = "cpu"
    weights: int = 0
    """Bytes of its weights, 0 where it has never loaded them."""
    not_woken: str = ""
    """Why it could not be woken when it was last told to; a sentence."""
    silent_s: float = 0.0
    """Seconds since its last sign of life, of those in which the head could have heard it."""

    @property
    def credits(self) -> int:
        """Units of work that it would still take."""
        return self.issued - self.spent

    @property
    def problem(self) -> str:
        """What a person may have to mend for it to work."""
        return self.trouble or self.not_woken

    @property
    def holds(self) -> bool:
        """Whether its device has its weights, or is about to."""
        return self.awake or self.told == "wake"

    def end(self, stalled_after_s: float) -> End:
        """What the loss of its connection means."""
        if self.leaving:
            return End.LEFT
        return End.STALLED if self.silent_s >= stalled_after_s else End.CRASHED

    def serves(self, panel: Panel) -> bool:
        """Whether work for `panel` starts here. A monolithic instance takes a unit at its first panel, for all."""
        return self.kind == panel.value or (self.kind == "monolithic" and panel is Panel.ENCODER)

    def view(self) -> InstanceView:
        """What `/v1/cluster` shows."""
        return InstanceView(
            self.name,
            self.kind,
            self.generation,
            self.credits,
            self.slots,
            tuple(sorted(self.in_hand)),
            self.problem,
            self.awake,
            self.weights,
        )


class Fleet:
    """The instances by name, and those that were given up."""

    def __init__(self, configured: Mapping[Panel, int] | None = None) -> None:
        self.configured = dict(configured or {})
        """Units of work that all instances of the topology can hold together, by panel."""
        self.instances: dict[str, Instance] = {}
        self._fenced: dict[str, int] = {}
        self._turns = 0

    def welcome(self, hello: InstanceHello) -> Instance:
        """Enter an incarnation, in place of any earlier one of that name."""
        known = self.instances.get(hello.name)
        instance = Instance(
            name=hello.name,
            kind=hello.kind,
            generation=hello.generation,
            slots=hello.slots,
            pool=hello.pool,
            issued=hello.issued,
            spent=hello.taken,
            signature=hello.signature,
            model=hello.model,
            last_served=known.last_served if known else 0,
            draining=hello.leaving,
            leaving=hello.leaving,
            awake=hello.awake,
            device=hello.device,
            weights=hello.weights,
        )
        self.instances[hello.name] = instance
        return instance

    def generation(self, name: str) -> int:
        """Number of the present incarnation of that name, 0 when there is none."""
        instance = self.instances.get(name)
        return instance.generation if instance else 0

    def incarnation(self, name: str, generation: int) -> Instance | None:
        """The instance of that name, unless it is another incarnation of it."""
        instance = self.instances.get(name)
        return instance if instance and instance.generation == generation else None

    def fenced(self, name: str, generation: int) -> bool:
        """Whether this incarnation was given up, so that nothing it says counts."""
        return generation <= self._fenced.get(name, 0)

    def fence(self, name: str, generation: int) -> None:
        """Give an incarnation up for good."""
        self._fenced[name] = max(generation, self._fenced.get(name, 0))

    def remove(self, name: str) -> Instance | None:
        """Forget an instance that is gone."""
        return self.instances.pop(name, None)

    def credit(self, name: str, issued: int) -> None:
        """Take note of credits; an older number than one already seen changes nothing."""
        if instance := self.instances.get(name):
            instance.issued = max(instance.issued, issued)

    def candidates(self, panel: Panel) -> list[Candidate]:
        """Who would take work for `panel` now."""
        return [
            Candidate(i.name, i.credits, i.slots, len(i.in_hand), i.served, i.last_served, i.model)
            for i in self.instances.values()
            if i.credits > 0 and not i.draining and i.awake and not i.told and i.serves(panel)
        ]

    def assign(self, name: str, unit_id: str) -> None:
        """Spend one credit of an instance."""
        instance = self.instances[name]
        self._turns += 1
        instance.spent += 1
        instance.served += 1
        instance.last_served = self._turns
        instance.in_hand.add(unit_id)

    def refund(self, name: str) -> None:
        """An instance that did not take the work has not used its credit either."""
        if instance := self.instances.get(name):
            instance.spent -= 1

    def offer(self, name: str, generation: int, slots: Iterable[LeaseRef]) -> None:
        """Take note of the slots that an instance keeps ready."""
        if instance := self.incarnation(name, generation):
            offered = tuple(slots)
            instance.spares_taken.intersection_update(offered)
            instance.spares = [slot for slot in offered if slot not in instance.spares_taken]

    def take_spare(self, name: str, nbytes: int) -> LeaseRef | None:
        """Use up a slot that an instance keeps ready, if one is large enough."""
        instance = self.instances.get(name)
        fitting = next((slot for slot in instance.spares if slot.nbytes >= nbytes), None) if instance else None
        if instance and fitting:
            instance.spares.remove(fitting)
            instance.spares_taken.add(fitting)
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

    def let_go(self, name: str, unit_id: str) -> None:
        """The unit is no longer in the instance's hands."""
        if instance := self.instances.get(name):
            instance.in_hand.discard(unit_id)

    def slots(self, panel: Panel) -> int:
        """Units of work that the instances of `panel` can hold together."""
        return sum(i.slots for i in self.instances.values() if i.serves(panel))

    def silent(self, listened_s: float, timeout_s: float) -> list[Instance]:
        """Instances that have been silent for longer than `timeout_s`, now that `listened_s` more have passed."""
        for instance in self.instances.values():
            instance.silent_s += listened_s
        return [instance for instance in self.instances.values() if instance.silent_s > timeout_s]

    def missing_panels(self) -> list[str]:
        """Panels that nobody serves at present."""
        if any(i.kind == "monolithic" for i in self.instances.values()):
            return []
        return [p.value for p in Panel if not any(i.serves(p) for i in self.instances.values())]
