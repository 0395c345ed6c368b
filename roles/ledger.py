"""The head's decisions: what becomes of each unit of work on each event.

Plain data in, plain data out: an event method changes the books and queues effects; the head carries them out.
No clock, no socket, no disk.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from triptych.engines.panels import Panel
from triptych.engines.parameters import Signature
from triptych.roles.dispatch import Policy
from triptych.roles.effects import Assign, Cancel, Effect, Release, Restart, Settle, Turn
from triptych.roles.fleet import End, Fleet
from triptych.roles.messages.stages import (
    InstanceAwake,
    InstanceHello,
    StageFailed,
    StageFinished,
    StageReturned,
    TransferFailed,
    TransferStaged,
)
from triptych.roles.messages.work import LeaseRef, Work
from triptych.roles.prompt_cache import block
from triptych.roles.reload import next_to_restart
from triptych.roles.request import DONE, RUNNING, UPSTREAM, WAITING, Request, State, Unit
from triptych.roles.staging import Staging, room_ahead

MAX_DEATHS = 2
"""A unit that was being computed when its instance died, this often, is held to be the cause."""

MAX_STALLS = 5
"""Instances fall silent because their machine does, but a unit that silences each one must not go on for ever."""

STALLED_AFTER = 0.5
"""Heartbeat timeouts of silence before a lost connection is laid to that silence: nobody crashes so slowly."""

MAX_TRANSFERS_LOST = 10
"""Lost transfers are nobody's fault in particular, but memory that damages everything must not keep a unit for ever."""

DRAINING = ("draining", "stopping")
"""Codes with which an instance that is about to end refuses work."""

UNTRIED = (*DRAINING, "asleep", "no_credit", "slot_gone", "cancelled", "mailbox_full", "deadline_exceeded")
"""Codes of refusals before anything was done for the work: they are not the work's fault."""


def _is_begun(unit: Unit) -> bool:
    return bool(unit.instance or unit.staged) or unit.state not in (State.PENDING, State.ENCODER_WAITING)


@dataclass(slots=True)
class Tally:
    """Sums over the units that came to an end."""

    completed: int = 0
    latency_s: float = 0.0
    """Of completed units alone: a failure is no fast success."""

    @property
    def average_latency_s(self) -> float:
        """0 before the first completion."""
        return self.latency_s / self.completed if self.completed else 0.0


@dataclass(slots=True)
class Ledger:
    """All requests, all instances, and the rules between them."""

    policy: Policy
    max_pending: int = 256
    max_attempts: int = 3
    waiting_timeout_s: float = 0.0
    """Most seconds that a stage may wait, 0 for no bound."""
    running_timeout_s: float = 0.0
    """Most seconds that a stage may run, 0 for no bound."""
    heartbeat_timeout_s: float = 15.0
    """Most seconds that an instance may be silent."""
    requests: dict[str, Request] = field(default_factory=dict)
    by_key: dict[str, Request] = field(default_factory=dict)
    """Those that came with an idempotency key."""
    units: dict[str, Unit] = field(default_factory=dict)
    """The active ones."""
    fleet: Fleet = field(default_factory=Fleet)
    staging: Staging = field(default_factory=Staging)
    tally: Tally = field(default_factory=Tally)
    dirty: set[str] = field(default_factory=set)
    """Ids of units changed since the journal was last written."""
    effects: list[Effect] = field(default_factory=list)
    model: str = ""
    """Version of the weights that new work is made with; "" until an instance has come."""
    refused: dict[str, str] = field(default_factory=dict)
    """Instances that were turned away, by name, with the version of their weights."""
    reloading: bool = False
    """Whether instances with earlier weights finish what was begun with those, and restart."""
    restarting: str = ""
    """The instance that was told to restart and has not come back yet."""
    paused: bool = False
    """Whether nothing is begun: the model sleeps, or is to sleep. What has been begun goes on."""

    # -- clients

    def room(self, n: int) -> bool:
        """Whether n more units fit under `max_pending`."""
        return len(self.units) + n <= self.max_pending

    def accept(self, request: Request, now: float) -> None:
        """Enter a request that the journal has; units that nothing has happened to yet start to wait."""
        self.requests[request.id] = request
        if request.idempotency_key:
            self.by_key[request.idempotency_key] = request
        self.units.update({unit.id: unit for unit in request.units if not unit.terminal})
        for unit in request.units:
            if not unit.terminal:
                self.staging.adopt(unit)
            if unit.state is State.PENDING:
                unit.attempt = 1
                unit.advance(State.ENCODER_WAITING, now)
                self.dirty.add(unit.id)

    def resume(self, request: Request, pools: Collection[str], instances: Collection[str], now: float) -> None:
        """Enter a request that an earlier head has left.

        What it had in pools, and with instances, that there are no more is forgotten: it is made again, from as far
        back as that takes, with the same seed.
        """
        moved = []
        for unit in request.units:
            lost = [panel for panel, staged in unit.staged.items() if staged.lease.pool not in pools]
            unit.forget_staged(lost)
            if not unit.terminal and (lost or (unit.instance and unit.instance not in instances)):
                moved.append(unit)
        self.accept(request, now)
        for unit in moved:
            self._retry(unit, "the topology has changed", now, counts=False)

    def cancel(self, request_id: str, reason: str, now: float) -> None:
        """Stop what is left of a request; nothing where there is none."""
        self._stop_all(request_id, State.CANCELLED, reason, now)

    def fail(self, request_id: str, reason: str, now: float) -> None:
        """Fail what is left of a request, which cannot be served any more."""
        self._stop_all(request_id, State.FAILED, reason, now)

    def _stop_all(self, request_id: str, state: State, reason: str, now: float) -> None:
        request = self.requests.get(request_id)
        for unit in request.units if request else ():
            if not unit.terminal:
                self._stop(unit, state, reason, now)

    # -- instances

    def admit(self, name: str, model: str) -> bool:
        """Whether an instance has the weights that work is made with; the first after none was left decides which."""
        others = {i.model for i in self.fleet.instances.values() if i.name != name}
        if model == self.model or (self.reloading and model in others):
            self.refused.pop(name, None)
            return True
        if self.model in others:
            self.refused[name] = model
            return False
        self._go_over_to(model)
        return True

    def reload(self, model: str) -> tuple[str, ...]:
        """Make new work with other weights; returns the names of the instances that restart for it, one by one."""
        if model != self.model:
            self._go_over_to(model)
        stale = {i.name for i in self.fleet.instances.values() if i.model != model}
        self.reloading = bool(stale)
        return tuple(sorted(stale | ({self.restarting} if self.restarting else set())))

    def hello(self, hello: InstanceHello, now: float) -> tuple[Work, ...]:
        """Enter an instance; returns the work that it has in hand and should drop."""
        self.fleet.welcome(hello)
        if hello.name == self.restarting and hello.model == self.model:
            self.restarting = ""
        if hello.awake or hello.weights:
            self._learn(hello.kind, hello.signature)
        in_hand = set(hello.running)
        for unit in [u for u in self.units.values() if u.instance == hello.name]:
            if unit.work in in_hand:
                self.fleet.instances[hello.name].in_hand.add(unit.id)
            else:
                self._retry(unit, f"{hello.name} came back without it", now, counts=False)
        return tuple(w for w in hello.running if not self._holds(hello.name, w))

    def _learn(self, kind: str, signature: Signature) -> None:
        """Take note of what encoders read; one that has never loaded its weights does not know it."""
        if kind == Panel.ENCODER and self.staging.cache.learn(signature):
            self.clear_cache()

    def turn(self, names: Iterable[str], *, awake: bool) -> None:
        """Have instances sleep or wake that are not on their way to it."""
        for name in names:
            instance = self.fleet.instances[name]
            if instance.awake != awake and not instance.told:
                instance.told = "wake" if awake else "sleep"
                self.effects.append(Turn(name, awake))

    def turned(self, report: InstanceAwake) -> bool:
        """An instance has gone to sleep, or has woken, or could not."""
        instance = self.fleet.incarnation(report.name, report.generation)
        if instance is None:
            return False
        instance.told = ""
        instance.awake = report.awake
        instance.not_woken = report.trouble
        if report.awake:
            instance.signature, instance.weights = report.signature, report.weights
            self._learn(instance.kind, report.signature)
        return True

    def not_turned(self, name: str, generation: int) -> None:
        """An instance was not told to sleep or to wake, or would not."""
        if instance := self.fleet.incarnation(name, generation):
            instance.told = ""

    @property
    def begun(self) -> bool:
        """Whether a unit is under way, in an instance's hands or between two stages."""
        return any(_is_begun(unit) for unit in self.units.values())

    @property
    def waits_s(self) -> float | None:
        """Seconds that the oldest unit which is not in an instance's hands has waited; None where there is none."""
        return max((unit.stage_s for unit in self.units.values() if not unit.instance), default=None)

    def instance_down(self, name: str, cause: str, now: float, end: End = End.CRASHED) -> None:
        """An instance is gone; what it had in hand is done again, elsewhere if possible.

        Only an end that the work may have caused counts against it.
        """
        self.fleet.remove(name)
        for unit in [u for u in self.units.values() if u.instance == name]:
            unit.deaths += unit.running and end is End.CRASHED
            unit.stalls += unit.running and end is End.STALLED
            self._retry(unit, f"{name}: {cause}", now, counts=end is End.CRASHED)

    def connection_lost(self, name: str, generation: int, now: float) -> bool:
        """The process of an incarnation has ended; False when nothing is known of it any more."""
        instance = self.fleet.incarnation(name, generation)
        if instance is None:
            return False
        end = instance.end(STALLED_AFTER * self.heartbeat_timeout_s)
        self.instance_down(name, end.value, now, end)
        return True

    def listen(self, seconds: float, now: float) -> list[str]:
        """Let `seconds` pass in which instances could be heard; returns the names of those given up for silence."""
        silent = self.fleet.silent(seconds, self.heartbeat_timeout_s)
        for instance in silent:
            self.fleet.fence(instance.name, instance.generation)
            cause = f"not heard of for {self.heartbeat_timeout_s:g} s"
            self.instance_down(instance.name, cause, now, End.STALLED)
        return [instance.name for instance in silent]

    def pool_down(self, pool: str, older_than: int, now: float) -> None:
        """The tensors staged in a pool's earlier generations are gone."""
        for unit in self.staging.lose(list(self.units.values()), pool, older_than):
            self.dirty.add(unit.id)
            # An instance that has it in hand may have loaded it already; it says so if it has not.
            if not unit.instance:
                self._retry(unit, f"{pool}: its staged tensors are gone", now, counts=False)

    def room_wanted(self, pool: str, nbytes: int) -> int:
        """A pool has no room for a slot: what lies there without need makes some; returns the bytes of it."""
        leases = self.staging.make_room(pool, nbytes)
        self._give_back(leases)
        return sum(block(lease.nbytes) for lease in leases)

    def give_way(self, pool: str, now: float) -> None:
        """Begin units anew that wait, with tensors in a pool, for instances that are asleep: others need its room.

        Those may have to end before there is memory for the weights of this model.
        """
        instances = self.fleet.instances.values()
        if not instances or any(instance.awake for instance in instances):
            return
        for unit in list(self.units.values()):
            if not unit.instance and any(staged.lease.pool == pool for staged in unit.staged.values()):
                self._give_back(self.staging.drop(unit))
                self._retry(unit, f"{pool} was full, and its model is asleep", now, counts=False)

    def clear_cache(self) -> None:
        """Start to cache anew."""
        self._give_back(self.staging.clear())
        for request in self.requests.values():
            request.prompt_key = b""

    def orphans(self, now: float) -> None:
        """After a restart of the head: what nobody has claimed is done again."""
        for unit in list(self.units.values()):
            if unit.instance and unit.instance not in self.fleet.instances:
                self._retry(unit, f"{unit.instance} did not come back", now, counts=False)

    # -- reports: each returns False when it is about an attempt that no longer counts

    def not_taken(self, name: str, work: Work, code: str, cause: str, now: float) -> None:
        """The instance refused the work, with the code of a `bus` failure or of `roles.workload.NotTaken`."""
        if code in DRAINING:
            self.fleet.drain(name)
        if code != "no_credit":
            self.fleet.refund(name)
        if unit := self._current(work, name):
            self._retry(unit, f"{name}: {cause}", now, counts=code not in UNTRIED)

    def started(self, work: Work, name: str, panel: Panel, now: float) -> bool:
        """The panel runs."""
        unit = self._current(work, name)
        if unit is None:
            return False
        if unit.state is not RUNNING[panel]:
            unit.advance(RUNNING[panel], now)
        unit.instances[panel.value] = name
        self.dirty.add(unit.id)
        return True

    def progress(self, work: Work, step: int, total_steps: int) -> None:
        """A denoising step is done."""
        unit = self.units.get(work.unit_id)
        if unit and unit.attempt == work.attempt:
            unit.step, unit.total_steps = step, total_steps

    def staged(self, report: TransferStaged, now: float) -> bool:
        """A panel's outputs are at rest; the unit goes on to wait for the next one."""
        panel = report.panel
        self.fleet.credit(report.instance, report.issued)
        unit = self._current(report.work, report.instance)
        if unit is None or unit.panel is not panel:
            if not self.staging.holds(report.staged.lease):
                self._give_back((report.staged.lease,))
            return False
        self._let_go(unit)
        unit.stage_seconds[panel.value] = report.seconds
        unit.advance(DONE[panel], now)
        self._give_back(self.staging.put(unit, panel, report.staged))
        if panel is Panel.ENCODER and self.staging.cache.capacity and unit.model == self.model:
            key = self._prompt_key(unit)
            self._give_back(self.staging.offer(key, unit.seed, report.staged, seedless=report.seedless))
        unit.advance(next(WAITING[p] for p, upstream in UPSTREAM.items() if upstream is panel), now)
        self.dirty.add(unit.id)
        return True

    def finished(self, report: StageFinished, now: float) -> bool:
        """The picture is on disk."""
        self.fleet.credit(report.instance, report.issued)
        unit = self._current(report.work, report.instance)
        if unit is None:
            return False
        unit.stage_seconds[report.panel.value] = report.seconds
        unit.artifact = report.artifact
        if unit.state is not State.DECODER_RUNNING:
            unit.advance(State.DECODER_RUNNING, now)
        self._end(unit, State.DONE, "", now)
        return True

    def stage_failed(self, report: StageFailed, now: float) -> bool:
        """The panel raised."""
        self.fleet.credit(report.instance, report.issued)
        unit = self._current(report.work, report.instance)
        if unit is None:
            return False
        if report.retryable:
            self._retry(unit, f"{report.instance}: {report.error}", now)
        else:
            unit.at_fault = report.at_fault
            self.give_up(report.work, report.instance, report.error, now)
        return True

    def returned(self, report: StageReturned, now: float) -> bool:
        """The instance ends before it can have done the work."""
        self.fleet.credit(report.instance, report.issued)
        unit = self._current(report.work, report.instance)
        if unit is None:
            return False
        self._retry(unit, f"{report.instance}: {End.LEFT.value}", now, counts=False)
        return True

    def transfer_failed(self, report: TransferFailed, now: float) -> bool:
        """Staged tensors could not be fetched."""
        self.fleet.credit(report.instance, report.issued)
        unit = self._current(report.work, report.instance)
        if unit is None:
            return False
        if report.source_gone:
            self._give_back(self.staging.drop(unit, spoilt=True))
        unit.transfers_lost += 1
        if unit.transfers_lost > MAX_TRANSFERS_LOST:
            self.give_up(report.work, report.instance, report.reason, now)
        else:
            self._retry(unit, f"{report.instance}: {report.reason}", now, counts=False)
        return True

    def give_up(self, work: Work, name: str, reason: str, now: float) -> None:
        """It would fail wherever it was tried."""
        if unit := self._current(work, name):
            unit.causes.append(f"{name}: {reason}")
            self._end(unit, State.FAILED, reason, now)

    # -- time

    def elapse(self, seconds: float, now: float) -> None:
        """Let `seconds` pass; ends what has used up the time of its request or of its stage."""
        for unit in list(self.units.values()):
            unit.left_s -= seconds
            unit.stage_s += seconds
            bound_s = self.running_timeout_s if unit.running else self.waiting_timeout_s
            if unit.left_s <= 0:
                request = self.requests[unit.request_id]
                given_s = request.deadline - request.created_at
                bound = f"[head] request_timeout_s = {given_s:g}"
                reason = f"still {unit.state} after {given_s - unit.left_s:.3g} s ({bound}){self._trouble(unit)}"
                self._stop(unit, State.TIMED_OUT, reason, now)
            elif bound_s and unit.stage_s >= bound_s:
                key = "running_timeout_s" if unit.running else "waiting_timeout_s"
                reason = f"{unit.state} for {unit.stage_s:.3g} s ([head] {key} = {bound_s:g}){self._trouble(unit)}"
                self._stop(unit, State.TIMED_OUT, reason, now)

    def _trouble(self, unit: Unit) -> str:
        """What the instance that has the unit waits for."""
        instance = self.fleet.instances.get(unit.instance)
        return f": {instance.trouble}" if instance and instance.trouble else ""

    def dispatch(self, now: float) -> None:
        """Give waiting units, oldest first, to instances with credits; what the cache has needs no encoder."""
        self._reload_next(now)
        for panel in Panel:
            if panel is Panel.ENCODER and self.paused:
                continue
            caches = panel is Panel.ENCODER and self.staging.cache.capacity > 0
            room = room_ahead(panel, self.units.values(), self.fleet)
            candidates = self.fleet.candidates(panel)
            encoding = {self._prompt_key(u) for u in self.units.values() if caches and u.instance and u.panel is panel}
            for unit in [u for u in self.units.values() if u.state is WAITING[panel] and not u.instance]:
                if room < 1 or not (candidates or caches):
                    break
                model = unit.model if unit.made_of_old(self.model) else self.model
                alike = [candidate for candidate in candidates if candidate.model == model]
                if caches and self._skip_encoder(unit, now):
                    room -= 1
                elif alike and not (caches and self._same_is_made(unit, encoding)):
                    self._assign(unit, panel, self.policy(alike).name)
                    candidates = self.fleet.candidates(panel)
                    room -= 1

    def _prompt_key(self, unit: Unit) -> bytes:
        request = self.requests[unit.request_id]
        request.prompt_key = request.prompt_key or self.staging.cache.key(request.inputs)
        return request.prompt_key

    def _same_is_made(self, unit: Unit, encoding: set[bytes]) -> bool:
        """Whether what an encoder makes at present will do for this unit too; if not, it is the next to be encoded."""
        key = self._prompt_key(unit)
        waits = key in encoding and self.staging.cache.can_wait(key, self.requests[unit.request_id].inputs)
        encoding.add(key)
        return waits

    def _assign(self, unit: Unit, panel: Panel, name: str) -> None:
        unit.instance = unit.instances[panel.value] = name
        unit.model = self.fleet.instances[name].model
        self.staging.cache.misses += panel is Panel.ENCODER and self.staging.cache.capacity > 0
        self.fleet.assign(name, unit.id)
        self.dirty.add(unit.id)
        self.effects.append(Assign(name, unit.id))

    def _skip_encoder(self, unit: Unit, now: float) -> bool:
        """Send a unit on to the denoisers when what an encoder would make for it is in the cache."""
        found = self.staging.cache.find(self._prompt_key(unit), unit.seed)
        if found is None:
            return False
        self.staging.cache.hits += 1
        for kept in (unit.instances, unit.stage_seconds):
            kept.pop(Panel.ENCODER.value, None)
        self.staging.put(unit, Panel.ENCODER, found)
        unit.borrows = True
        unit.model = self.model
        unit.move(State.ENCODER_DONE, now, "prompt cache")
        unit.advance(State.DENOISING_WAITING, now)
        self.dirty.add(unit.id)
        return True

    def take_effects(self) -> list[Effect]:
        """The effects queued since the last call."""
        effects, self.effects = self.effects, []
        return effects

    def counts(self) -> dict[str, int]:
        """Active units by state."""
        counts: dict[str, int] = {}
        for unit in self.units.values():
            counts[unit.state.value] = counts.get(unit.state.value, 0) + 1
        return counts

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop terminal requests from the books."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request and request.terminal:
                del self.requests[request_id]
                self.by_key.pop(request.idempotency_key, None)

    # -- changed weights

    def _go_over_to(self, model: str) -> None:
        self.model = model
        self.refused.clear()
        self.staging.cache.model = model
        self.clear_cache()

    def _reload_next(self, now: float) -> None:
        """Start units anew that were begun with weights which nobody has any more; restart the next instance."""
        if not self.model:
            return
        instances = self.fleet.instances.values()
        for unit in [u for u in self.units.values() if u.made_of_old(self.model) and not u.instance]:
            if not any(i.model == unit.model and unit.panel and i.serves(unit.panel) for i in instances):
                self._give_back(self.staging.drop(unit))
                self._retry(unit, "the model has changed", now, counts=False)
        if self.reloading and not self.restarting:
            self.reloading = any(i.model != self.model for i in instances)
            if chosen := next_to_restart(instances, self.units.values(), self.model):
                self.restarting = chosen.name
                chosen.draining = True
                self.effects.append(Restart(chosen.name))

    # -- inside

    def _current(self, work: Work, name: str) -> Unit | None:
        unit = self.units.get(work.unit_id)
        return unit if unit and unit.work == work and unit.instance == name else None

    def _holds(self, name: str, work: Work) -> bool:
        return self._current(work, name) is not None

    def _let_go(self, unit: Unit) -> None:
        self.fleet.let_go(unit.instance, unit.id)
        unit.instance = ""
        unit.step = 0

    def _give_back(self, leases: tuple[LeaseRef, ...]) -> None:
        if leases:
            self.effects.append(Release(leases))

    def _retry(self, unit: Unit, cause: str, now: float, *, counts: bool = True) -> None:
        """Start the unit's stage again, or fail it when it has been tried often enough."""
        panel = unit.panel or Panel.ENCODER
        self._let_go(unit)
        unit.causes.append(cause)
        unit.failures += counts
        if unit.failures >= self.max_attempts or unit.deaths >= MAX_DEATHS or unit.stalls >= MAX_STALLS:
            self._end(unit, State.FAILED, self._why_given_up(unit), now)
            return
        unit.attempt += 1
        target = WAITING[unit.resume_panel(panel)]
        if unit.state is not target:
            unit.move(target, now, cause)
        self.dirty.add(unit.id)

    def _why_given_up(self, unit: Unit) -> str:
        if unit.deaths >= MAX_DEATHS:
            return f"{unit.deaths} instances died while they computed it; last: {unit.causes[-1]}"
        if unit.stalls >= MAX_STALLS:
            return f"{unit.stalls} instances fell silent while they computed it; last: {unit.causes[-1]}"
        return f"given up after {unit.failures} failed attempts; last: {unit.causes[-1]}"

    def _stop(self, unit: Unit, state: State, reason: str, now: float) -> None:
        if unit.instance:
            self.effects.append(Cancel(unit.instance, unit.work, reason))
        self._end(unit, state, reason, now)

    def _end(self, unit: Unit, state: State, reason: str, now: float) -> None:
        self._let_go(unit)
        self._give_back(self.staging.drop(unit))
        unit.move(state, now, reason)
        del self.units[unit.id]
        self.dirty.add(unit.id)
        request = self.requests[unit.request_id]
        if state is State.DONE:
            self.tally.completed += 1
            self.tally.latency_s += now - request.created_at
        if request.terminal:
            request.finished_at = now
            self.effects.append(Settle(request.id))
