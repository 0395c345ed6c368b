"""Decide which models have their weights in memory: if not all fit, the least recently used sleep.

A model that is asleep keeps its processes, its requests and its entries in the registry; a request for it wakes it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf

from triptych.actors import Component, Topology
from triptych.engines.stages import Stage
from triptych.roles.head.registry import InstanceRecord
from triptych.roles.head.served_models import ServedModel, ServedModels

PLAN_EVERY_S = 0.2
"""Seconds for which a plan holds if no instance has changed and no model has come to, or run out of, work. The plan
looks at all instances; what else it goes by is time."""
RETRY_S = 5.0
"""Seconds between two tries to wake an instance that found too little memory."""
BytesByDevice = Mapping[str, int]
"""Bytes of weights by device; with `[[hosts]]` a device is that of a host, as in "cuda:0@b"."""


class ResidencyState(StrEnum):
    """Where a model stands."""

    STARTING = "starting"
    """Some of its instances are missing, or have never loaded it."""
    LOADED = "loaded"
    ASLEEP = "asleep"
    WAKING = "waking"


@dataclass(frozen=True, slots=True)
class ResidentModel:
    """The memory that a model needs, and how it is used."""

    name: str
    needs: BytesByDevice
    """Bytes that it takes when it is awake."""
    awake: bool
    """Whether its weights are to be in memory, by the last decision."""
    begun: bool = False
    """Whether a job of it is under way, which has to be finished before it sleeps."""
    waiting_s: float | None = None
    """Seconds that its oldest unassigned job has waited; None if there is none."""
    awake_s: float = 0.0
    """Seconds of its turn so far: since all its instances have been awake."""
    used: float = 0.0
    """Time of its last request, by any clock."""
    pinned: bool = False
    """Whether it never sleeps."""
    sleep_requested: bool = False
    """Whether it is to sleep as soon as it is idle."""

    @property
    def has_work(self) -> bool:
        """Return whether there is a request for it."""
        return self.begun or self.waiting_s is not None


@dataclass(slots=True)
class ResidencyPlan:
    """The decision about all models, by name."""

    awake: set[str] = field(default_factory=set)
    """Models whose weights are to be in memory."""
    drained: set[str] = field(default_factory=set)
    """Those of them that start no more jobs, so that others get a turn."""


def plan_residency(residents: Collection[ResidentModel], budgets: BytesByDevice, turn_s: float) -> ResidencyPlan:
    """Decide which models are awake. Pure.

    The model that has waited longest is woken first. If memory is short, idle models sleep, the least recently used
    first; then models that have been awake for `turn_s`, once their active jobs have ended. A model that exceeds the
    budget is woken alone. If the awake models need more than the budget, idle ones sleep as well.

    Args:
        residents: All models with instances.
        budgets: Most bytes of weights by device; a device without an entry has no bound.
        turn_s: Seconds for which a model with requests stays awake although others wait.
    """
    made = ResidencyPlan()
    # Jobs may have begun just as their model was to sleep; it cannot finish them asleep, so others wait for it again.
    stranded = any(r.begun and not r.awake for r in residents)
    there = [r for r in residents if (r.awake or r.begun) and not (r.sleep_requested and not r.has_work)]
    may_wait = [r for r in there if not (r.begun or r.pinned) and (stranded or not r.has_work)]
    for resident in sorted(may_wait, key=lambda r: (r.has_work, r.used)):
        others = [r for r in there if r is not resident]
        crowded = overcommitted(resident.needs, [r.needs for r in others], budgets)
        if any(device in other.needs for device in crowded for other in others):
            there = others
    absent = [r for r in residents if r not in there and r.waiting_s is not None]
    for waiting in sorted(absent, key=lambda r: -(r.waiting_s or 0.0)):
        gone, drained, fits = _evict_for(waiting, there, budgets, turn_s)
        there = [r for r in there if r not in gone]
        made.drained |= {r.name for r in drained}
        if not fits:
            break  # a model that came later does not go first
        there.append(waiting)
    made.awake = {r.name for r in there}
    return made


def overcommitted(needs: BytesByDevice, held: Iterable[BytesByDevice], budgets: BytesByDevice) -> set[str]:
    """Return the devices where `needs` exceeds the budget, given what they hold. Pure."""
    held = tuple(held)
    return {
        device
        for device, nbytes in needs.items()
        if device in budgets and nbytes + sum(other.get(device, 0) for other in held) > budgets[device]
    }


def _evict_for(
    waiting: ResidentModel, there: list[ResidentModel], budgets: BytesByDevice, turn_s: float
) -> tuple[list[ResidentModel], list[ResidentModel], bool]:
    """Return the models that sleep now for `waiting`, those that finish jobs first, and whether it is woken now."""

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
    # If memory is still short, it is because of models that never sleep, or of `waiting` itself.
    return gone, drained, not drained


class ResidencyManager:
    """Carries out the plan: pauses and resumes the schedulers, and makes instances sleep and wake.

    Args:
        topology: Has the memory budgets.
        models: All models.
    """

    def __init__(self, topology: Topology, models: ServedModels) -> None:
        self._models = models
        self._budgets = {"cpu": topology.memory.host_bytes, "cuda": topology.memory.card_bytes}
        self._turn_s = topology.memory.turn_s
        self._roles = {served.key: _roles(topology.components, served) for served in models.all}
        self._hosts = {component.name: component.host for component in topology.components}
        self._kinds = {key: len({role.kind for role in roles}) for key, roles in self._roles.items()}
        """Number of kinds of roles of a model, by its key."""
        self._decided: dict[str, bool] = {}
        self._to_wake_since: dict[str, float] = {}
        self._awake_since: dict[str, float] = {}
        self._used: dict[str, float] = {}
        self._sleep_requested: set[str] = set()
        self._wake_requested: set[str] = set()
        self._tried: dict[str, float] = {}
        """When an instance was last told to wake."""
        self._weights: dict[str, int] = {}
        """Bytes of weights by instance, as last reported."""
        self._planned_at = -inf
        self._planned_for: object = None

    def state(self, served: ServedModel) -> ResidencyState:
        """Return the state of a model."""
        instances = served.scheduler.registry.instances.values()
        if served.scheduler.registry.missing_stages():
            return ResidencyState.STARTING
        if _covers_all_stages(instances, awake=True):
            return ResidencyState.LOADED
        if not served.has_been_loaded:
            return ResidencyState.STARTING
        return ResidencyState.WAKING if self._is_awake(served) else ResidencyState.ASLEEP

    def request_sleep(self, served: ServedModel) -> None:
        """Let a model sleep as soon as it is idle."""
        self._wake_requested.discard(served.key)
        self._sleep_requested.add(served.key)

    def request_wake(self, served: ServedModel) -> None:
        """Wake a model, as a request for it would."""
        self._sleep_requested.discard(served.key)
        self._wake_requested.add(served.key)

    def update(self, now: float) -> None:
        """Plan, and carry it out, if the last plan is old or of another situation; `now` is of a monotonic clock."""
        situation = [(s.registry.version, s.begun, bool(s.jobs)) for s in self._models.schedulers]
        asked = (frozenset(self._sleep_requested), frozenset(self._wake_requested))
        if now - self._planned_at < PLAN_EVERY_S and (situation, asked) == self._planned_for:
            return
        self._planned_at, self._planned_for = now, (situation, asked)
        self._plan(now)

    def _plan(self, now: float) -> None:
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
        if scheduler.registry.missing_stages():  # its weights would be of no use
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
        """Return the seconds of its turn so far, which begins when all is awake, or was to be if that is impossible."""
        registry, key = served.scheduler.registry, served.key
        hindered = registry.missing_stages() or any(instance.wake_error for instance in registry.instances.values())
        return now - self._awake_since.get(key, self._to_wake_since.get(key, now) if hindered else now)

    def _is_awake(self, served: ServedModel) -> bool:
        """Return the last decision; before the first one, whether an instance is awake."""
        found = any(instance.awake for instance in served.scheduler.registry.instances.values())
        return self._decided.get(served.key, found)

    def _needs(self, served: ServedModel) -> list[BytesByDevice]:
        """Return the bytes for each instance of the topology, by its device."""
        there = served.scheduler.registry.instances
        return [
            {self._device(c.name, (there[c.name].device if c.name in there else "") or c.device): need}
            for c in self._roles[served.key]
            for need in [self._need(served, c.name)]
        ]

    def _device(self, name: str, device: str) -> str:
        """Return the device of an instance, as `BytesByDevice` has it."""
        host = self._hosts.get(name, "")
        return f"{device}@{host}" if host else device

    def _budget(self, device: str) -> int:
        """Return the most bytes on a device, 0 for no bound."""
        return self._budgets.get(device.partition("@")[0].partition(":")[0], 0)

    def _need(self, served: ServedModel, name: str) -> int:
        """Return the bytes that an instance needs; before its first load, its share of the model's files.

        An instance that found too little memory counts as needing the whole budget.
        """
        instance = served.scheduler.registry.instances.get(name)
        if instance and instance.wake_error and not instance.awake:
            return self._budget(instance.device)
        return self._weights.get(name) or served.weight_file_bytes // self._kinds[served.key]

    def _budgets_of(self, needs: Iterable[BytesByDevice]) -> BytesByDevice:
        """Return the budgets of the devices in `needs`."""
        devices = {device for each in needs for device in each}
        bounds = {device: self._budget(device) for device in devices}
        return {device: nbytes for device, nbytes in bounds.items() if nbytes}

    def _wake(self, served: ServedModel, now: float) -> None:
        """Wake the instances of a model, each once its weights fit or no other instance is about to free memory."""
        for instance in list(served.scheduler.registry.instances.values()):
            if instance.awake or instance.changing_to or instance.draining:
                continue
            if instance.wake_error and now - self._tried.get(instance.name, -RETRY_S) < RETRY_S:
                continue
            held, leaving = self._neighbours_memory(instance)
            need = {self._device(instance.name, instance.device): self._need(served, instance.name)}
            if leaving and overcommitted(need, held, self._budgets_of([need])):
                continue
            self._tried[instance.name] = now
            served.scheduler.set_awake([instance.name], awake=True)

    def _neighbours_memory(self, instance: InstanceRecord) -> tuple[list[BytesByDevice], bool]:
        """Return what other instances hold, and whether one is about to release its weights on the same device."""
        others = [
            (s, i) for s in self._models.all for i in s.scheduler.registry.instances.values() if i is not instance
        ]
        held: list[BytesByDevice] = [
            {self._device(i.name, i.device): self._need(served, i.name)} for served, i in others if i.has_weights
        ]
        here = self._device(instance.name, instance.device)
        leaving = any(
            i.awake
            and self._device(i.name, i.device) == here
            and not (i.draining or self._decided.get(served.key, True))
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
    scheduler = served.scheduler
    return [i for i in scheduler.registry.instances.values() if i.awake and not (i.draining or scheduler.load(i.name))]


def _covers_all_stages(instances: Collection[InstanceRecord], *, awake: bool) -> bool:
    """Return whether every stage has an instance, with `awake` one that is awake."""
    if any(i.kind == "monolithic" for i in instances if i.awake or not awake):
        return True
    return all(any(i.serves(stage) for i in instances if i.awake or not awake) for stage in Stage)
