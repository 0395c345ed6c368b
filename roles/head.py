"""The head router: accepts requests, sends each stage to an instance with a credit, and sees every request to its end.

The decisions are the ledger's; here they meet the bus, the clock and the journal.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias, cast

import msgspec

from triptych.actors import Actor, Component, Later, StartDelayed, StartFailure, Topology
from triptych.actors.sections import parse_size
from triptych.actors.system import (
    ChildReport,
    ModelStanding,
    Reloading,
    ReloadModel,
    SleepModel,
    SupervisorQuery,
    SupervisorReport,
    WakeModel,
)
from triptych.bus import BusError, Refused
from triptych.engines.card import CardError, load_card
from triptych.engines.lora import check_lora
from triptych.engines.model_version import model_version
from triptych.engines.panels import ModelError, Panel
from triptych.engines.parameters import MASKS, Signature
from triptych.roles.artifacts import ARTIFACTS, ArtifactError, ArtifactStore
from triptych.roles.errands import Errands
from triptych.roles.formats import settle_output
from triptych.roles.given_up import given_up
from triptych.roles.journal import Journal, JournalError, prune
from triptych.roles.ledger import Ledger
from triptych.roles.messages import pool as pools
from triptych.roles.messages import requests, stages
from triptych.roles.messages.work import MAX_SEED, Input, Pictures, Tensors, Upload, Work
from triptych.roles.models import Served, file_bytes, models_of
from triptych.roles.prompt_cache import PromptCache
from triptych.roles.request import IllegalTransitionError, Request, Unit
from triptych.roles.residency import Residency
from triptych.roles.retention import StoreBounds
from triptych.roles.staging import Staging
from triptych.roles.uploads import UPLOADS, UploadStore

Report: TypeAlias = (
    stages.StageStarted
    | stages.TransferReady
    | stages.TransferStaged
    | stages.StageFinished
    | stages.StageFailed
    | stages.TransferFailed
    | stages.StageReturned
    | stages.StageCancelled
)
About: TypeAlias = requests.QueryRequest | requests.WaitRequest | requests.CancelRequest | requests.DeleteRequest
"""Messages about a request that is known already."""
Answer: TypeAlias = requests.RequestAccepted | requests.RequestRejected
TICK_S = 0.25
RECLAIM_S = 5.0
"""Between two looks for slots that no request needs."""
REMAINDERS_S = 10.0
"""Between two times that the journal learns how much time requests have left, if nothing else happens to them."""
PRUNE_EVERY_S = 60.0
LOOK_S = 1.0
"""Between two looks at the supervisors, while something is missing."""
RESTARTED_S = 60.0
"""After which a client may try again where a person has to step in."""
PROBE_S = 1.0
"""Between two looks whether a journal that could not be written can be again."""
OTHER_MODEL = "it was accepted for another model than the one that is served now: send it again"
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def build(component: Component, topology: Topology) -> list[Actor]:
    """The actors of the head's process."""
    return [Head(topology)]


class Head(Actor):
    """One per cluster. Its mailbox takes the client conversation and the instances' reports."""

    def __init__(self, topology: Topology) -> None:
        super().__init__("head")
        self.topology = topology
        self.models = models_of(topology)
        pool_names = tuple(c.name for c in topology.components if c.kind == "pool")
        self.errands = Errands(self, self.models, self.settle, pool_names)
        self.residency = Residency(topology, self.models)
        self.created_at = time.time()
        self._artifacts = ArtifactStore(topology.state_dir / ARTIFACTS)
        self._uploads = UploadStore(topology.state_dir / UPLOADS)
        self._journal: Journal | None = None
        self._unwritten = ""
        self._ended: dict[str, asyncio.Event] = {}
        self._untold: list[str] = []
        """Ids of requests whose end is not known to be on the disk."""
        self._writes = self._synced = 0
        """Transactions of the journal, and those of them that are on the disk."""
        self._syncing = asyncio.Lock()

    async def started(self) -> None:
        """Read the journal back and start to keep time.

        Raises:
            StartFailure: the journal is corrupt or of a newer version, or the model is broken.
            StartDelayed: the journal is locked or the disk is full, or the folder of the model is away.
        """
        now = time.time()
        for served in self.models.all:
            await self._read_model(served)
        try:
            # In a thread, because heartbeats have to go on, however large it is.
            self._journal = await asyncio.to_thread(Journal, self._journal_path, self._complain)
            for request in await asyncio.to_thread(self._journal.active):
                self._resume(request, now)
        except JournalError as error:
            raise (StartDelayed if error.may_pass else StartFailure)(str(error)) from error
        if self.models.units_count:
            self.log.info("resumed from the journal", units=self.models.units_count)
        self.spawn(self._keep_time(), name="clock")
        self.spawn(self._keep_bounds(), name="prune")
        self.spawn(self._watch_supervisors(), name="supervisors")
        self.errands.watch_pools()
        self.settle()  # what could not be resumed has ended: written down before anybody asks

    async def stopping(self) -> None:
        """Write what is unwritten; the instances go on with what they have in hand."""
        self._all_dirty()
        self.settle()
        if self._journal:
            try:
                await self._on_disk()
            except JournalError as error:  # nobody was told of what it lacks
                self._cannot_write(error)
            self._journal.close()

    def facts(self) -> dict[str, int | float | str | bool]:
        """What the journal could not give back."""
        return {"journal_damaged": self._journal.damaged} if self._journal else {}

    # -- the client conversation

    async def submit(self, message: requests.SubmitRequest) -> Later[Answer]:
        """Accept a request: check it, write it down, start it."""
        return Later(self._accepted(message, self._submit(message)))

    def _submit(self, message: requests.SubmitRequest) -> Answer:
        digest = _digest(message)
        try:
            if known := self._known_by_key(_key(message)):
                if known.digest == digest:
                    return requests.RequestAccepted(known.id)
                return requests.RequestRejected("conflict", "this Idempotency-Key came with another body before")
            served = self.models.find(message.model)
            if served is None:
                sentence = self.models.unknown(message.model)
                return requests.RequestRejected("model_not_found", sentence, param="model")
            if served.given_up:
                sentence = f"{served.given_up}: the server has to be restarted"
                return requests.RequestRejected("unavailable", sentence, retry_after_s=RESTARTED_S)
            request = self._request(served, message, digest)
            pending = self.models.units_count
            if pending + message.n > self.topology.head.max_pending:
                return requests.RequestRejected(
                    "full",
                    f"{pending} of at most {self.topology.head.max_pending} pictures are under way, and "
                    f"{message.n} more do not fit: try again",
                    retry_after_s=max(1.0, served.ledger.tally.average_latency_s),
                )
            self._open_journal.accept(request)
        except CardError as error:
            return requests.RequestRejected("invalid", error.message, param=error.param)
        except JournalError as error:
            return self._not_accepted(error)
        self._writes += 1
        served.ledger.accept(request, time.time())
        self.settle()
        return requests.RequestAccepted(request.id)

    async def _accepted(self, message: requests.SubmitRequest, answer: Answer) -> Answer:
        """Give an answer that promises something once that is on the disk."""
        if isinstance(answer, requests.RequestAccepted):
            try:
                await self._on_disk()
            except JournalError as error:
                if answer.request_id == message.request_id:
                    self._cancel(message.request_id, "it could not be put on the disk")
                    self.settle()
                return self._not_accepted(error)
        return answer

    def _not_accepted(self, error: JournalError) -> requests.RequestRejected:
        self._cannot_write(error)
        return requests.RequestRejected("unavailable", str(error), retry_after_s=5.0)

    async def query(self, message: requests.QueryRequest) -> Later[requests.RequestView]:
        """How a request stands."""
        return Later(self._view(self._find(message)))

    async def wait(self, message: requests.WaitRequest) -> Later[requests.RequestView]:
        """Answer when the request has ended, or at the timeout."""
        return Later(self._wait(self._find(message), message.timeout_s))

    async def cancel(self, message: requests.CancelRequest) -> Later[requests.RequestView]:
        """Stop a request."""
        request = self._find(message)
        self._cancel(request.id, message.reason)
        self.settle()
        return Later(self._view(request))

    async def list_requests(self, message: requests.ListRequests) -> requests.RequestList:
        """Name the requests of an owner."""
        try:
            after = self._known_by_id(message.after) if message.after else None
            if message.after and (after is None or message.owner not in ("", after.owner)):
                raise Refused("not_found", f"there is no request {message.after}")
            ids = self._open_journal.ids(
                message.owner, after=after, limit=message.limit + 1, newest_first=message.newest_first
            )
        except JournalError as error:
            raise Refused("unavailable", str(error)) from error
        return requests.RequestList(tuple(ids[: message.limit]), len(ids) > message.limit)

    async def delete(self, message: requests.DeleteRequest) -> Later[requests.RequestDeleted]:
        """Remove a request for good."""
        return Later(self._delete(message))

    async def describe(self, message: requests.DescribeModel) -> requests.ModelDescription:
        """What a model takes."""
        return self._describe(self._named(message.model))

    async def list_models(self, _: requests.ListModels) -> requests.ModelList:
        """What is served."""
        return requests.ModelList(tuple(self._describe(served) for served in self.models.all))

    def _describe(self, served: Served) -> requests.ModelDescription:
        return served.describe(self.created_at, self.residency.standing(served).value)

    async def sleep_model(self, message: SleepModel) -> ModelStanding:
        """Let a model sleep as soon as it has nothing to do."""
        served = self._named(message.model)
        if served.model.section.sleep == "never":
            raise Refused("never", f'{served.name} never sleeps: its `sleep` is "never"')
        if message.begins:
            self.residency.dismiss(served)
            self.settle()
        return self._standing(served)

    async def wake_model(self, message: WakeModel) -> ModelStanding:
        """Wake a model."""
        served = self._named(message.model)
        self.residency.call(served)
        self.settle()
        return self._standing(served)

    def _named(self, name: str) -> Served:
        """Return the model of that name; raises Refused where there is none."""
        if served := self.models.find(name):
            return served
        raise Refused("model_not_found", self.models.unknown(name))

    def _standing(self, served: Served) -> ModelStanding:
        instances = served.ledger.fleet.instances.values()
        troubles = "; ".join(f"{i.name}: {i.problem}" for i in instances if i.problem)
        weights = sum(i.weights for i in instances if i.awake)
        return ModelStanding(served.name, self.residency.standing(served).value, weights, troubles)

    async def cluster(self, _: requests.ClusterQuery) -> requests.ClusterView:
        """The books."""
        reasons = self._reasons()
        return requests.ClusterView(
            ready=not reasons,
            reasons=reasons,
            instances=tuple(i.view() for ledger in self.models.ledgers for i in ledger.fleet.instances.values()),
            states=self.models.counts(),
            completed=self.models.completed,
            average_latency_s=self.models.average_latency_s,
            prompt_cache=self.models.prompt_cache(),
            models={served.name: self.residency.standing(served).value for served in self.models.all},
        )

    async def reload_model(self, message: ReloadModel) -> Later[Reloading]:
        """Go over to changed weights."""
        return Later(self._reload(message.model))

    async def room_wanted(self, message: pools.RoomWanted) -> None:
        """A pool is full."""
        wanted = message.nbytes
        for ledger in self.models.ledgers:
            if wanted > 0:
                wanted -= ledger.room_wanted(message.pool, wanted)
        for ledger in self.models.ledgers:
            if wanted > 0:
                ledger.give_way(message.pool, time.time())
        self.settle()

    # -- the instances' conversation

    async def hello(self, message: stages.InstanceHello) -> stages.InstanceWelcome:
        """An instance offers itself."""
        self._refuse_fenced(message.name, message.generation)
        ledger = self._books_of(message.name)
        if not ledger.admit(message.name, message.model):
            raise Refused("other_model", _other_weights(message.name))
        unknown = ledger.hello(message, time.time())
        self.log.info("instance joined", instance=message.name, kept=len(message.running) - len(unknown))
        self.spawn(self.errands.watch_instance(message.name, message.generation), name=f"watch {message.name}")
        self.settle()
        return stages.InstanceWelcome(unknown)

    async def alive(self, message: stages.InstanceAlive) -> stages.Acknowledged:
        """An instance's heartbeat."""
        self._refuse_fenced(message.name, message.generation)
        if not self._books_of(message.name).fleet.heard(message.name, message.generation, message.trouble):
            raise Refused("unknown", f"{message.name} is not in the books: say hello again")
        return stages.Acknowledged()

    async def turned(self, message: stages.InstanceAwake) -> stages.Acknowledged:
        """An instance has woken, or has gone to sleep, or could not."""
        self._refuse_fenced(message.name, message.generation)
        if self._books_of(message.name).turned(message):
            how = "awake" if message.awake else "asleep"
            self.log.info(f"instance {how}", instance=message.name, seconds=round(message.seconds, 3))
        self.settle()
        return stages.Acknowledged()

    async def leaving(self, message: stages.InstanceLeaving) -> stages.Acknowledged:
        """An instance was asked to end."""
        self._books_of(message.name).fleet.leave(message.name, message.generation)
        return stages.Acknowledged()

    async def slots_offered(self, message: stages.SlotsOffered) -> None:
        """An instance keeps slots ready for what is pushed to it."""
        self._books_of(message.instance).fleet.offer(message.instance, message.generation, message.slots)

    async def stage_started(self, message: stages.StageStarted) -> stages.Acknowledged:
        """A panel runs."""
        return self._enter(
            message, lambda ledger, now: ledger.started(message.work, message.instance, message.panel, now)
        )

    async def stage_progress(self, message: stages.StageProgress) -> None:
        """A denoising step is done."""
        for ledger in self.models.ledgers:
            ledger.progress(message.work, message.step, message.total_steps)

    async def transfer_ready(self, message: stages.TransferReady) -> stages.Acknowledged:
        """Staged tensors are loaded; the panel runs next."""
        return self._enter(message, lambda _ledger, _now: True)

    async def transfer_staged(self, message: stages.TransferStaged) -> stages.Acknowledged:
        """A panel's outputs are at rest."""
        if message.panel is Panel.DECODER:
            raise Refused("invalid", "what a decoder makes is written, and rests in no pool")
        return self._enter(message, lambda ledger, now: ledger.staged(message, now))

    async def stage_finished(self, message: stages.StageFinished) -> stages.Acknowledged:
        """A picture is done."""
        self._discard_late(message.work)
        return self._enter(message, lambda ledger, now: ledger.finished(message, now))

    async def stage_failed(self, message: stages.StageFailed) -> stages.Acknowledged:
        """A panel raised."""
        return self._enter(message, lambda ledger, now: ledger.stage_failed(message, now))

    async def transfer_failed(self, message: stages.TransferFailed) -> stages.Acknowledged:
        """Staged tensors could not be fetched."""
        return self._enter(message, lambda ledger, now: ledger.transfer_failed(message, now))

    async def stage_returned(self, message: stages.StageReturned) -> stages.Acknowledged:
        """An instance that ends gives work back."""
        return self._enter(message, lambda ledger, now: ledger.returned(message, now))

    async def stage_cancelled(self, message: stages.StageCancelled) -> stages.Acknowledged:
        """Work was dropped as told."""
        self._books_of(message.instance).fleet.credit(message.instance, message.issued)
        self._discard_late(message.work)
        return self._enter(message, lambda _ledger, _now: True)

    # -- carrying out

    async def _read_model(self, served: Served) -> None:
        """Read a model's card. Raises StartFailure where it is broken, StartDelayed where its folder is away."""
        model = served.model
        try:
            served.card = load_card(model.path, model.section.task, model.title)
            served.identity = await asyncio.to_thread(lambda: model.identity)
            served.file_bytes = await asyncio.to_thread(file_bytes, model.files)
        except (ModelError, OSError) as error:
            kind = StartFailure if model.path.is_dir() else StartDelayed
            raise kind(str(error)) from error
        cached = f"{served.name}, {model.section.dtype}"
        served.ledger.staging = Staging(PromptCache(model.prompt_cache_bytes, cached))

    def _resume(self, request: Request, now: float) -> None:
        """Enter a request that an earlier head has left; what the topology has no place for any more is forgotten."""
        components = self.topology.components
        pools = {component.name for component in components if component.kind == "pool"}
        served, same = self.models.heir(request)
        instances = {c.name for c in components if c.slots and c.model == served.key}
        request.model, ledger = served.key, served.ledger
        ledger.resume(request, pools, instances, now)
        if not same:
            ledger.fail(request.id, OTHER_MODEL, now)
        try:
            check_lora(request.inputs, served.lora_names, served.name)
        except CardError as error:
            ledger.fail(request.id, f"since the topology has changed, {error.param} {error.message}", now)

    def settle(self) -> None:
        """After an event: hand out work, write down what changed, then let it take effect."""
        now = time.time()
        self.residency.arrange(time.monotonic())
        for ledger in self.models.ledgers:
            ledger.dispatch(now)
        self._write_down()
        for ledger in self.models.ledgers:
            self._untold += self.errands.carry_out(ledger.take_effects())
        if self._untold and not any(ledger.dirty for ledger in self.models.ledgers):
            ended, self._untold = self._untold, []
            self.spawn(self._tell(ended), name="tell")

    async def _tell(self, ended: list[str]) -> None:
        """Wake who waits for the end of a request, once that is on the disk: then the journal answers for it."""
        try:
            await self._on_disk()
        except JournalError as error:
            self._cannot_write(error)
            self._untold += ended
            return
        for ledger in self.models.ledgers:
            ledger.forget(ended)
        for request_id in ended:
            if event := self._ended.pop(request_id, None):
                event.set()

    async def _on_disk(self) -> None:
        """Return when all that has been written until now is on the disk; many wait for one `sync`.

        Raises:
            JournalError: the disk refuses.
        """
        wanted = self._writes
        async with self._syncing:
            if self._synced < wanted:
                written = self._writes
                await asyncio.to_thread(self._open_journal.sync)
                self._synced = written

    def _write_down(self) -> None:
        changed = [ledger for ledger in self.models.ledgers if ledger.dirty]
        if self._journal is None or not changed:
            return
        touched, units = [], []
        for ledger in changed:
            ids = {unit_id.rpartition("/")[0] for unit_id in ledger.dirty}
            of_it = [ledger.requests[i] for i in ids if i in ledger.requests]
            touched += of_it
            units += [u for request in of_it for u in request.units if u.id in ledger.dirty]
        try:
            self._journal.save(touched, units)
        except JournalError as error:
            # The work itself goes on: what could not be written is still dirty and is tried again at the next event.
            self._cannot_write(error)
            return
        self._writes += 1
        self._can_write()
        for ledger in changed:
            ledger.dirty.clear()

    def _all_dirty(self) -> None:
        for ledger in self.models.ledgers:
            ledger.dirty.update(ledger.units)

    def _cannot_write(self, error: JournalError) -> None:
        if not self._unwritten:
            self.log.warning("the journal cannot be written", error=str(error))
        self._unwritten = str(error)

    def _can_write(self) -> None:
        if self._unwritten:
            self.log.info("the journal can be written again")
        self._unwritten = ""

    def _probe(self) -> None:
        """See whether a journal that could not be written can be again, where nothing waits to be written."""
        try:
            self._open_journal.probe()
        except JournalError as error:
            self._cannot_write(error)
        else:
            self._can_write()

    async def _keep_time(self) -> None:
        # Wall clock time is for people and for the journal: what is decided here is decided by elapsed time.
        awake_at = probed_at = reclaimed_at = written_at = time.monotonic()
        listened_s = 0.0
        resumed = self.models.units_count > 0
        while True:
            await asyncio.sleep(TICK_S)
            asleep_at, awake_at = awake_at, time.monotonic()
            heard_s = listening_s(awake_at - asleep_at)
            listened_s += heard_s
            now = time.time()
            for ledger in self.models.ledgers:
                ledger.elapse(awake_at - asleep_at, now)
                for name in ledger.listen(heard_s, now):
                    self.log.warning("instance fenced", instance=name, silent_s=ledger.heartbeat_timeout_s)
            if resumed and listened_s > self.topology.supervision.heartbeat_timeout_s:
                for ledger in self.models.ledgers:
                    ledger.orphans(now)
                resumed = False
            if not resumed and awake_at - reclaimed_at > RECLAIM_S:
                reclaimed_at = awake_at
                self.spawn(self.errands.reclaim(), name="reclaim")
            if awake_at - written_at > REMAINDERS_S:
                written_at = awake_at
                self._all_dirty()
            if self._unwritten and awake_at - probed_at > PROBE_S:
                probed_at = awake_at
                self._probe()
            self.settle()

    async def _watch_supervisors(self) -> None:
        """Know, for ever, whether what is missing may still come."""
        while True:
            pools = self.errands.pools_missing()
            missing = [served for served in self.models.all if pools or served.ledger.fleet.missing_panels()]
            children = await self._children() if missing else []
            for served in self.models.all:
                served.given_up = given_up(self._parts_of(served), children) if served in missing else ""
            await asyncio.sleep(LOOK_S)

    def _parts_of(self, served: Served) -> list[Component]:
        """The instances of a model, and the pools."""
        return [c for c in self.topology.components if c.kind == "pool" or (c.slots and c.model == served.key)]

    async def _children(self) -> list[ChildReport]:
        children: list[ChildReport] = []
        for name in self.book.supervisors():
            try:
                report = await self.reference(name).ask(SupervisorQuery(), SupervisorReport, timeout_s=LOOK_S)
            except BusError as error:  # a socket that a crash has left
                self.log.debug("no word of a supervisor", supervisor=name, error=str(error))
            else:
                children += report.children
        return children

    async def _keep_bounds(self) -> None:
        """Remove what is too old or too much, for ever."""
        while True:
            try:
                gone = await asyncio.to_thread(self._prune, frozenset(self.models.requests), time.time())
            except (JournalError, OSError) as error:  # what is left is tried again the next time
                self.log.warning("not pruned", error=str(error))
            else:
                if any(gone.values()):
                    self.log.info("pruned", **gone)
            await asyncio.sleep(PRUNE_EVERY_S)

    def _prune(self, active: frozenset[str], now: float) -> dict[str, int]:
        """Remove requests, then artifacts, but for those that somebody is still to get."""
        state = self.topology.state
        bounds = StoreBounds(state.keep_requests_s, state.max_requests, parse_size(state.max_requests_size))
        ended, awaited = prune(self._journal_path, bounds, now=now)
        bounds = StoreBounds(state.keep_artifacts_s, state.max_artifacts, parse_size(state.max_artifacts_size))
        artifacts = self._artifacts.prune(bounds, now=now, needed=awaited | active)
        return {"requests": ended, "artifacts": artifacts}

    async def _reload(self, name: str) -> Reloading:
        """Raises Refused where there is no such model, the files cannot be read, or an instance would not come back."""
        chosen = [served for served in self.models.all if name in ("", served.name)]
        if not chosen:
            raise Refused("model_not_found", self.models.unknown(name))
        keys = {served.key for served in chosen}
        once = [c.name for c in self.topology.components if c.slots and c.model in keys and c.restart != "permanent"]
        if once:
            raise Refused("not_permanent", f'{", ".join(once)} would not restart: their `restart` is not "permanent"')
        versions, stale = list[str](), list[str]()
        for served in chosen:
            model = served.model
            try:
                card = await asyncio.to_thread(load_card, model.path, model.section.task, model.title)
                version = await asyncio.to_thread(model_version, model.files)
            except (ModelError, OSError) as error:
                raise Refused("model", str(error)) from error
            served.card = card
            versions.append(version)
            stale += served.ledger.reload(version)
        self.settle()
        return Reloading(", ".join(versions), tuple(stale))

    # -- inside

    @property
    def _journal_path(self) -> Path:
        return self.topology.state_dir / "journal.sqlite"

    def _complain(self, damage: str) -> None:
        self.log.error("a request was lost from the journal", damage=damage)

    @property
    def _open_journal(self) -> Journal:
        if self._journal is None:
            raise JournalError("the journal is not open yet")
        return self._journal

    def _request(self, served: Served, message: requests.SubmitRequest, digest: str) -> Request:
        """Raises CardError, naming the input at fault, and JournalError."""
        taken = self.models.holder(message.request_id) or self._open_journal.find(message.request_id)
        if not _ID.fullmatch(message.request_id) or taken:
            raise CardError("request_id", "must be new, and of at most 64 letters, digits, - and _")
        if not 1 <= message.n <= self.topology.head.max_pending:
            raise CardError("n", f"must be from 1 to {self.topology.head.max_pending}")
        # Before the first instance has come, the names that the pipeline takes are not known: then it checks them.
        inputs = cast(dict[str, Input], served.card.apply(message.inputs, served.parameters, served.signature.tasks))
        served.card.check_total(inputs, message.n)
        if any(component.kind == "pool" for component in self.topology.components):
            _check_payload(inputs, served.signature, self.topology.transfer.largest_payload)
        output = settle_output(message.output, served.signature, message.inputs, inputs)
        check_lora(inputs, served.lora_names, served.name)
        now = time.time()
        timeout_s = self.topology.head.request_timeout_s
        seeds = seeds_of(secrets.randbits(32) if message.seed is None else message.seed, message.n)
        id_ = message.request_id
        units = [Unit(f"{id_}/{k}", id_, k, seed, timeout_s) for k, seed in enumerate(seeds)]
        deadline, key = now + timeout_s, _key(message)
        return Request(
            id_,
            inputs,
            output,
            now,
            deadline,
            units,
            key,
            digest,
            owner=message.owner,
            served=served.identity,
            model=served.key,
        )

    def _known(self, message: About) -> Request | None:
        """The request that a message is about; None also where it is somebody else's."""
        try:
            request = self._known_by_id(message.request_id)
        except JournalError as error:
            raise Refused("unavailable", str(error)) from error
        return request if request and message.owner in ("", request.owner) else None

    def _known_by_id(self, request_id: str) -> Request | None:
        """A request that is active, or whose end may still be untold, else one of the journal. Raises JournalError."""
        return self.models.request(request_id) or self._open_journal.find(request_id)

    def _known_by_key(self, key: str) -> Request | None:
        return (self.models.request_of_key(key) or self._open_journal.find_key(key)) if key else None

    def _cancel(self, request_id: str, reason: str) -> None:
        """Stop what is left of a request; nothing where there is none."""
        if ledger := self.models.holder(request_id):
            ledger.cancel(request_id, reason, time.time())

    def _find(self, message: About) -> Request:
        if request := self._known(message):
            return request
        lost = self._journal is not None and self._journal.set_aside(message.request_id)
        why = "what the journal had of it was damaged, and has been set aside" if lost else "it may have been forgotten"
        raise Refused("not_found", f"there is no request {message.request_id}: {why}")

    async def _delete(self, message: requests.DeleteRequest) -> requests.RequestDeleted:
        request, request_id = self._known(message), message.request_id
        if request is None:
            return requests.RequestDeleted(existed=False)
        self._cancel(request_id, "deleted by the client")
        self.settle()
        used = self._uploads_in_use()
        try:
            # The files first: what is still in the journal after a crash can be deleted again.
            await asyncio.to_thread(self._discard_files, request, used)
            self._open_journal.delete(request_id)
            self._writes += 1
            await self._on_disk()
        except (JournalError, OSError) as error:
            raise Refused("unavailable", f"{request_id} cannot be deleted: {error}") from error
        for ledger in self.models.ledgers:
            ledger.forget([request_id])
        self.log.info("request deleted", request_id=request_id)
        return requests.RequestDeleted(existed=True)

    def _discard_late(self, work: Work) -> None:
        """Remove what an instance has written for a request that was deleted meanwhile."""
        try:
            if self._known_by_id(work.unit_id.rpartition("/")[0]) is None:
                self.spawn(self._discard(work), name="discard")
        except JournalError as error:  # it is pruned by its age
            self.log.warning("artifact not removed", work=str(work), error=str(error))

    async def _discard(self, work: Work) -> None:
        try:
            await asyncio.to_thread(self._artifacts.discard, work.unit_id)
        except (ArtifactError, OSError) as error:  # it is pruned by its age
            self.log.warning("artifact not removed", work=str(work), error=str(error))

    def _uploads_in_use(self) -> set[Upload]:
        active = [request for ledger in self.models.ledgers for request in ledger.requests.values()]
        return {upload for request in active if not request.terminal for upload in _uploads(request)}

    def _discard_files(self, request: Request, needed: set[Upload]) -> None:
        for unit in request.units:
            self._artifacts.discard(unit.id)
        for upload in _uploads(request) - needed:
            self._uploads.discard(upload, saved_before=request.created_at)

    async def _wait(self, request: Request, timeout_s: float) -> requests.RequestView:
        if self.models.holder(request.id):
            event = self._ended.setdefault(request.id, asyncio.Event())
            try:
                async with asyncio.timeout(timeout_s):
                    await event.wait()
            except TimeoutError:  # the view then says that it is still under way
                pass
        return await self._view(request)

    async def _view(self, request: Request) -> requests.RequestView:
        """Tell how a request stands; of its end only what the next head will tell as well.

        Raises:
            Refused: `unavailable` while its end cannot be written down.
        """
        if request.terminal and (ledger := self.models.holder(request.id)):
            not_yet = f"{request.id} has ended, but that is not on the disk"
            if any(unit.id in ledger.dirty for unit in request.units):
                raise Refused("unavailable", f"{not_yet}: {self._unwritten}")
            try:
                await self._on_disk()
            except JournalError as error:
                raise Refused("unavailable", f"{not_yet}: {error}") from error
        served = self.models.by_key(request.model)
        return request.view(served.name if served else request.model)

    def _reasons(self) -> tuple[str, ...]:
        missing = []
        for served in self.models.all:
            of = f" of {served.name}" if len(self.models.all) > 1 else ""
            fleet, refused = served.ledger.fleet, served.ledger.refused
            missing += [f"no {panel}{of} is ready" for panel in fleet.missing_panels()]
            if not (fleet.missing_panels() or served.has_been_loaded):
                missing.append(f"the weights{of} have not been loaded yet")
            missing += [f"{i.name}: {i.problem}" for i in fleet.instances.values() if i.problem]
            missing += [_other_weights(name) for name in refused]
        missing += [f"{pool} is not ready" for pool in self.errands.pools_missing()]
        return (*missing, *([self._unwritten] if self._unwritten else []))

    def _refuse_fenced(self, name: str, generation: int) -> None:
        if self._books_of(name).fleet.fenced(name, generation):
            raise Refused("fenced", f"{name} was given up: its work has gone to others")

    def _books_of(self, instance: str) -> Ledger:
        """Return the ledger of an instance; raises Refused for what is none of the topology."""
        if served := self.models.of(instance):
            return served.ledger
        raise Refused("unknown_instance", f"{instance} is no component of this topology")

    def _enter(self, report: Report, enter: Callable[[Ledger, float], bool]) -> stages.Acknowledged:
        """Enter a report in the books; once this has been answered, the instance may forget it."""
        try:
            current = enter(self._books_of(report.instance), time.time())
        except IllegalTransitionError as error:
            self.log.exception("illegal transition", report=type(report).__name__, work=str(report.work))
            raise Refused("illegal_transition", str(error)) from error
        if not current:
            self.log.info("stale report", report=type(report).__name__, work=str(report.work))
        self.settle()
        return stages.Acknowledged()


def _other_weights(name: str) -> str:
    return (
        f"{name} has other weights than the rest, because the model's files have changed: `triptych reload` takes them"
    )


def _uploads(request: Request) -> set[Upload]:
    values = request.inputs.values()
    pictures = {upload for value in values if isinstance(value, Pictures) for upload in value.files}
    return pictures | {value.file for value in values if isinstance(value, Tensors)}


def seeds_of(seed: int | tuple[int, ...], n: int) -> list[int]:
    """Return the seed of each of `n` pictures; raises CardError."""
    if isinstance(seed, tuple):
        if len(seed) != n:
            raise CardError("seed", f"must be {n} seeds, one for each of n, not {len(seed)}.")
        return list(seed)
    if seed + n - 1 > MAX_SEED:
        raise CardError("seed", f"must be at most {MAX_SEED} for the last picture, whose seed is seed + n - 1.")
    return [seed + k for k in range(n)]


def _key(message: requests.SubmitRequest) -> str:
    """Return the idempotency key, "" without one; keys of different owners differ, as names have no slash."""
    key = message.idempotency_key
    return f"{message.owner}/{key}" if key and message.owner else key


def listening_s(slept_s: float) -> float:
    """Of the seconds between two ticks, those in which the head can be said to have listened.

    A late tick counts as little more than one in time: while this process, or the machine, stood still nobody could
    be heard, and what was said before may still wait to be read.
    """
    return min(slept_s, 2 * TICK_S)


def _check_payload(inputs: Mapping[str, Input], signature: Signature, largest: int) -> None:
    """Raise CardError for images that are handed from stage to stage and can never fit a pool's block."""
    for name in signature.hands_on:
        images = inputs.get(name)
        pixel_bytes = 1 if name in MASKS else 3
        if isinstance(images, Pictures) and sum(file.pixels for file in images.files) * pixel_bytes > largest:
            together = " together" if len(images.files) > 1 else ""
            limit = f"must have at most {largest // pixel_bytes} pixels{together}"
            raise CardError(name, f"{limit}: one stage hands them to the next, in at most {largest} bytes of a pool")
    for name, value in inputs.items():
        if isinstance(value, Tensors) and value.file.nbytes > largest:
            raise CardError(name, f"must be at most {largest} bytes: one stage hands them to the next in a pool")


def _digest(message: requests.SubmitRequest) -> str:
    body: tuple[object, ...] = (sorted(message.inputs.items()), message.seed, message.n, message.output)
    if message.model:
        body += (message.model,)
    return hashlib.sha256(msgspec.json.encode(body)).hexdigest()
