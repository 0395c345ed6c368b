"""Which models have their weights in memory: the least recently used sleep where there is no room for all.

A model that sleeps keeps its processes, its requests and its place in the head's registry; a request for it wakes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from triptych.actors import Component, Topology
from triptych.engines.stages import Stage
from triptych.roles.head.registry import InstanceRecord
from triptych.roles.head.served_models import ServedModel, ServedModels

RETRY_S = 5.0
"""Between two tries to wake an instance that found no room."""
BytesByDevice = Mapping[str, int]
"""Bytes of weights by device."""


class ResidencyState(StrEnum):
    """What a model does at present."""

    STARTING = "starting"
    """Instances of it are missing, or it has not been loaded once yet."""
    LOADED = "loaded"
    ASLEEP = "asleep"
    WAKING = "waking"


@dataclass(frozen=True, slots=True)
class ResidentModel:
    """A model, as far as its memory goes."""

    name: str
    needs: BytesByDevice
    """What it takes when it is awake."""
    awake: bool
    """Whether it is to have its weights in memory, as was last decided."""
    begun: bool = False
    """Whether something is under way that has to be finished first."""
    waiting_s: float | None = None
    """Seconds that its oldest request which is not under way has waited; None where there is none."""
    awake_s: float = 0.0
    """Seconds of its turn so far: since it has been awake as a whole."""
    used: float = 0.0
    """When it last had a request, by any clock."""
    pinned: bool = False
    """It never sleeps."""
    sleep_requested: bool = False
    """It is to sleep as soon as it has nothing to do."""

    @property
    def has_work(self) -> bool:
        """Whether there is a request for it."""
        return self.begun or self.waiting_s is not None


@dataclass(slots=True)
class ResidencyPlan:
    """What is to become of the models, by name."""

    awake: set[str] = field(default_factory=set)
    """Those that are to have their weights in memory."""
    drained: set[str] = field(default_factory=set)
    """Of them, those that begin nothing more, for others to have a turn."""


def plan_residency(residents: Collection[ResidentModel], budgets: BytesByDevice, turn_s: float) -> ResidencyPlan:
    """Decide who is awake. Pure.

    Whoever waits longest is woken first. Where that takes more than there is, models without a request sleep, the
    least recently used first; then those that have been awake for `turn_s`, once they have finished what is under way.
    A model that fits nowhere is woken alone. Where those that are awake turn out to take more than there is, models
    without a request sleep as well.

    Args:
        residents: All models with instances.
        budgets: Most bytes of weights by device; without bound where it says nothing.
        turn_s: Seconds.
    """
    made = ResidencyPlan()
    there = [r for r in residents if r.awake and not (r.sleep_requested and not r.has_work)]
    for resident in sorted((r for r in there if not (r.has_work or r.pinned)), key=lambda r: r.used):
        others = [r for r in there if r is not resident]
        crowded = overcommitted(resident.needs, [r.needs for r in others], budgets)
        if any(device in other.needs for device in crowded for other in others):
            there = others
    absent = [r for r in residents if not r.awake and r.waiting_s is not None]
    for waiting in sorted(absent, key=lambda r: -(r.waiting_s or 0.0)):
        gone, drained, fits = _evict_for(waiting, there, budgets, turn_s)
        there = [r for r in there if r not in gone]
        made.drained |= {r.name for r in drained}
        if not fits:
            break  # nobody who came later goes first
        there.append(waiting)
    made.awake = {r.name for r in there}
    return made


def overcommitted(needs: BytesByDevice, held: Iterable[BytesByDevice], budgets: BytesByDevice) -> set[str]:
    """Return the devices that have no room for `needs` beside what they hold. Pure."""
    held = tuple(held)
    return {
        device
        for device, nbytes in needs.items()
        if device in budgets and nbytes + sum(other.get(device, 0) for other in held) > budgets[device]
    }


def _evict_for(
    waiting: ResidentModel, there: list[ResidentModel], budgets: BytesByDevice, turn_s: float
) -> tuple[list[ResidentModel], list[ResidentModel], bool]:
    """Return who sleeps for `waiting` now, who is to finish first, and whether it can be woken then."""

    def short(without: list[ResidentModel]) -> set[str]:
        return overcommitted(waiting.needs, [r.needs for r in there if r not in without], budgets)

    idle = sorted((r for r in there if not (r.has_work or r.pinned)), key=lambda r: r.used)
    busy = sorted((r for r in there if r.has_work and not r.pinned), key=lambda r: -r.awake_s)
    gone: list[ResidentModel] = []
    drained: list[ResidentModel] = []
    for resident in (*idle, *busy):
        wanted = short([*gone, *drained])
        if not wanted & resident.needs.keys():
            continue
        if resident.has_work and resident.awake_s < turn_s:
            return gone, drained, False
        (drained if resident.begun else gone).append(resident)
    # What is short now is so because of those that never sleep, or of itself.
    return gone, drained, not drained


class ResidencyManager:
    """Carries the plan out: tells each model's scheduler whether to begin, and instances to sleep and to wake.

    Args:
        topology: Says what there is room for.
        models: All of them.
    """

    def __init__(self, topology: Topology, models: ServedModels) -> None:
        self._models = models
        self._budgets = {"cpu": topology.memory.host_bytes, "cuda": topology.memory.card_bytes}
        self._turn_s = topology.memory.turn_s
        self._roles = {served.key: _roles(topology.components, served) for served in models.all}
        self._decided: dict[str, bool] = {}
        self._to_wake_since: dict[str, float] = {}
        self._awake_since: dict[str, float] = {}
        self._used: dict[str, float] = {}
        self._sleep_requested: set[str] = set()
        self._wake_requested: set[str] = set()
        self._tried: dict[str, float] = {}
        """When an instance was last told to wake."""
        self._weights: dict[str, int] = {}
        """Bytes by instance, as it last told."""

    def state(self, served: ServedModel) -> ResidencyState:
        """Say what a model does at present."""
        instances = served.scheduler.registry.instances.values()
        if served.scheduler.registry.missing_stages():
            return ResidencyState.STARTING
        if _covers_all_stages(instances, awake=True):
            return ResidencyState.LOADED
        if not served.has_been_loaded:
            return ResidencyState.STARTING
        return ResidencyState.WAKING if self._is_awake(served) else ResidencyState.ASLEEP

    def request_sleep(self, served: ServedModel) -> None:
        """Let a model sleep as soon as it has nothing to do."""
        self._wake_requested.discard(served.key)
        self._sleep_requested.add(served.key)

    def request_wake(self, served: ServedModel) -> None:
        """Wake a model, as a request for it would."""
        self._sleep_requested.discard(served.key)
        self._wake_requested.add(served.key)

    def update(self, now: float) -> None:
        """Decide, and have it done; `now` is in seconds of a monotonic clock."""
        present = [served for served in self._models.all if served.scheduler.registry.instances]
        residents = [self._resident(served, now) for served in present]
        made = plan_residency(residents, self._budgets_of([resident.needs for resident in residents]), self._turn_s)
        for served in present:
            awake = served.key in made.awake
            self._decided[served.key] = awake
            if awake:
                self._to_wake_since.setdefault(served.key, now)
            else:
                self._to_wake_since.pop(served.key, None)
                self._sleep_requested.discard(served.key)
            served.scheduler.paused = not awake or served.key in made.drained
            if not awake and not served.scheduler.begun:
                served.scheduler.set_awake([i.name for i in _may_sleep(served)], awake=False)
        for served in present:
            if self._decided[served.key]:
                self._wake(served, now)

    def _resident(self, served: ServedModel, now: float) -> ResidentModel:
        scheduler, key = served.scheduler, served.key
        for instance in scheduler.registry.instances.values():
            if instance.weights:
                self._weights[instance.name] = instance.weights
        if _covers_all_stages(scheduler.registry.instances.values(), awake=True):
            self._awake_since.setdefault(key, now)
            self._wake_requested.discard(key)
        else:
            self._awake_since.pop(key, None)
        waiting_s = scheduler.waiting_s
        if waiting_s is None and (key in self._wake_requested or not served.has_been_loaded):
            waiting_s = 0.0
        if scheduler.registry.missing_stages():  # nothing could be made with its weights
            waiting_s = None
        if scheduler.jobs:
            self._used[key] = now
        return ResidentModel(
            name=key,
            needs=_sum(self._needs(served)),
            awake=self._is_awake(served),
            begun=scheduler.begun,
            waiting_s=waiting_s,
            awake_s=self._awake_s(served, now),
            used=self._used.get(key, 0.0),
            pinned=served.model.section.sleep == "never",
            sleep_requested=key in self._sleep_requested,
        )

    def _awake_s(self, served: ServedModel, now: float) -> float:
        """Seconds of its turn so far. It begins when all is awake; of a model that cannot be, when it was to wake."""
        registry, key = served.scheduler.registry, served.key
        hindered = registry.missing_stages() or any(instance.wake_error for instance in registry.instances.values())
        return now - self._awake_since.get(key, self._to_wake_since.get(key, now) if hindered else now)

    def _is_awake(self, served: ServedModel) -> bool:
        """What was last decided; of a head that has just come, what it finds."""
        found = any(instance.awake for instance in served.scheduler.registry.instances.values())
        return self._decided.get(served.key, found)

    def _needs(self, served: ServedModel) -> list[BytesByDevice]:
        """Of each instance of the topology, by the device that it is on, or would be."""
        there = served.scheduler.registry.instances
        return [
            {(there[c.name].device if c.name in there else "") or c.device: self._need(served, c.name)}
            for c in self._roles[served.key]
        ]

    def _need(self, served: ServedModel, name: str) -> int:
        """Bytes that an instance takes; before it has been loaded once, its share of the model's files.

        One that found no room takes all that there is.
        """
        instance = served.scheduler.registry.instances.get(name)
        if instance and instance.wake_error and not instance.awake:
            return self._budgets.get(instance.device.partition(":")[0], 0)
        kinds = {component.kind for component in self._roles[served.key]}
        return self._weights.get(name) or served.weight_file_bytes // len(kinds)

    def _budgets_of(self, needs: Iterable[BytesByDevice]) -> BytesByDevice:
        """Budgets of the devices that there are."""
        devices = {device for each in needs for device in each}
        bounds = {device: self._budgets.get(device.partition(":")[0], 0) for device in devices}
        return {device: nbytes for device, nbytes in bounds.items() if nbytes}

    def _wake(self, served: ServedModel, now: float) -> None:
        """Wake the instances of a model, each once there is room for it or nobody is about to make some."""
        for instance in list(served.scheduler.registry.instances.values()):
            if instance.awake or instance.changing_to or instance.draining:
                continue
            if instance.wake_error and now - self._tried.get(instance.name, -RETRY_S) < RETRY_S:
                continue
            held, leaving = self._neighbours_memory(instance)
            need = {instance.device: self._need(served, instance.name)}
            if leaving and overcommitted(need, held, self._budgets_of([need])):
                continue
            self._tried[instance.name] = now
            served.scheduler.set_awake([instance.name], awake=True)

    def _neighbours_memory(self, instance: InstanceRecord) -> tuple[list[BytesByDevice], bool]:
        """Return what other instances hold, and whether one is about to leave the same device."""
        others = [
            (s, i) for s in self._models.all for i in s.scheduler.registry.instances.values() if i is not instance
        ]
        held: list[BytesByDevice] = [{i.device: self._need(served, i.name)} for served, i in others if i.holds]
        leaving = any(
            i.awake and i.device == instance.device and not (i.draining or self._decided.get(served.key, True))
            for served, i in others
        )
        return held, leaving


def _roles(components: Iterable[Component], served: ServedModel) -> tuple[Component, ...]:
    return tuple(c for c in components if c.slots and c.model == served.key)


def _sum(needs: Iterable[BytesByDevice]) -> BytesByDevice:
    together: dict[str, int] = {}
    for each in needs:
        for device, nbytes in each.items():
            together[device] = together.get(device, 0) + nbytes
    return together


def _may_sleep(served: ServedModel) -> list[InstanceRecord]:
    load = served.scheduler.load()
    return [i for i in served.scheduler.registry.instances.values() if i.awake and not (load[i.name] or i.draining)]


def _covers_all_stages(instances: Collection[InstanceRecord], *, awake: bool) -> bool:
    """Whether there is an instance for every stage that is awake, or just there."""
    if any(i.kind == "monolithic" for i in instances if i.awake or not awake):
        return True
    return all(any(i.serves(stage) for i in instances if i.awake or not awake) for stage in Stage)
