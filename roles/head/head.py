"""The head router: accepts requests, sends each stage to an instance with a credit, and sees every request to its end.

The decisions are the scheduler's; here they meet the bus, the clock and the journal.
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

from triptych.actors import Actor, Component, DeferredReply, StartDelayedError, StartError, Topology
from triptych.actors.runtime.system_messages import (
    ChildReport,
    ModelStatus,
    Reloading,
    ReloadModel,
    SleepModel,
    SupervisorQuery,
    SupervisorReport,
    WakeModel,
)
from triptych.actors.topology import parse_size
from triptych.bus import BusError, RefusedError
from triptych.engines.parameters.lora import check_lora
from triptych.engines.parameters.schema import MASKS, Signature
from triptych.engines.parameters.serving_config import ParameterError, load_serving_config
from triptych.engines.partition.stages import ModelError, Stage
from triptych.engines.weights.model_version import model_version
from triptych.roles.head.availability import unavailable_reason
from triptych.roles.head.effect_runner import EffectRunner
from triptych.roles.head.job import IllegalTransitionError, Job, Request
from triptych.roles.head.journal import Journal, JournalError, prune
from triptych.roles.head.prompt_cache import PromptCache
from triptych.roles.head.residency import ResidencyManager
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.head.served_models import ServedModel, served_models_of, weight_file_bytes
from triptych.roles.head.stored_outputs import StoredOutputs
from triptych.roles.media.artifacts import ARTIFACTS, ArtifactError, ArtifactStore
from triptych.roles.media.formats import resolve_output
from triptych.roles.media.retention import StoreBounds
from triptych.roles.media.uploads import UPLOADS, UploadStore
from triptych.roles.messages import pool as pools
from triptych.roles.messages import requests, stages
from triptych.roles.messages.common import MAX_SEED, Attempt, Images, Input, Tensors, Upload

Report: TypeAlias = (
    stages.StageStarted
    | stages.TransferReady
    | stages.StageOutputsStored
    | stages.StageFinished
    | stages.StageFailed
    | stages.TransferFailed
    | stages.StageReturned
    | stages.StageCancelled
)
ByRequestId: TypeAlias = requests.QueryRequest | requests.WaitRequest | requests.CancelRequest | requests.DeleteRequest
"""Messages about a request that is known already."""
SubmitAnswer: TypeAlias = requests.RequestAccepted | requests.RequestRejected
TICK_S = 0.25
RECLAIM_S = 5.0
"""Between two looks for blocks that no request needs."""
SAVE_TIMEOUTS_EVERY_S = 10.0
"""Between two times that the journal learns how much time requests have left, if nothing else happens to them."""
PRUNE_EVERY_S = 60.0
SUPERVISOR_QUERY_EVERY_S = 1.0
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
        self.models = served_models_of(topology)
        pool_names = tuple(c.name for c in topology.components if c.kind == "pool")
        self.effect_runner = EffectRunner(self, self.models, self.commit, pool_names)
        self.residency = ResidencyManager(topology, self.models)
        self.created_at = time.time()
        self._artifacts = ArtifactStore(topology.state_dir / ARTIFACTS)
        self._uploads = UploadStore(topology.state_dir / UPLOADS)
        self._journal: Journal | None = None
        self._journal_problem = ""
        self._ended: dict[str, asyncio.Event] = {}
        self._unnotified: list[str] = []
        """Ids of requests whose end is not known to be on the disk."""
        self._writes = self._synced_writes = 0
        """Transactions of the journal, and those of them that are on the disk."""
        self._syncing = asyncio.Lock()

    async def started(self) -> None:
        """Read the journal back and start to keep time.

        Raises:
            StartError: the journal is corrupt or of a newer version, or the model is broken.
            StartDelayedError: the journal is locked or the disk is full, or the folder of the model is away.
        """
        now = time.time()
        for served in self.models.all:
            await self._read_model(served)
        try:
            # In a thread, because heartbeats have to go on, however large it is.
            self._journal = await asyncio.to_thread(Journal, self._journal_path, self._log_damage)
            for request in await asyncio.to_thread(self._journal.active):
                self._resume(request, now)
        except JournalError as error:
            raise (StartDelayedError if error.transient else StartError)(str(error)) from error
        if self.models.jobs_count:
            self.log.info("resumed from the journal", jobs=self.models.jobs_count)
        self.spawn(self._clock_loop(), name="clock")
        self.spawn(self._prune_loop(), name="prune")
        self.spawn(self._watch_supervisors(), name="supervisors")
        self.effect_runner.watch_pools()
        self.commit()  # what could not be resumed has ended: written down before anybody asks

    async def stopping(self) -> None:
        """Write what is unwritten; the instances go on with what they have in hand."""
        self._all_dirty()
        self.commit()
        if self._journal:
            try:
                await self._synced()
            except JournalError as error:  # nobody was told of what it lacks
                self._journal_failed(error)
            self._journal.close()

    def stats(self) -> dict[str, int | float | str | bool]:
        """What the journal could not give back."""
        return {"journal_damaged": self._journal.damaged} if self._journal else {}

    # -- the client conversation

    async def submit(self, message: requests.SubmitRequest) -> DeferredReply[SubmitAnswer]:
        """Accept a request: check it, write it down, start it."""
        answer = self._submit(message)
        if served := self.models.find(message.model):
            answer = msgspec.structs.replace(answer, description_version=served.description_version)
        return DeferredReply(self._accepted(message, answer))

    def _submit(self, message: requests.SubmitRequest) -> SubmitAnswer:
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
            if served.unavailable_reason:
                sentence = f"{served.unavailable_reason}: the server has to be restarted"
                return requests.RequestRejected("unavailable", sentence, retry_after_s=RESTARTED_S)
            request = self._request(served, message, digest)
            pending = self.models.jobs_count
            if pending + message.n > self.topology.head.max_pending:
                return requests.RequestRejected(
                    "full",
                    f"{pending} of at most {self.topology.head.max_pending} images are under way, and "
                    f"{message.n} more do not fit: try again",
                    retry_after_s=max(1.0, served.scheduler.tally.average_latency_s),
                )
            self._open_journal.accept(request)
        except ParameterError as error:
            return requests.RequestRejected("invalid", error.message, param=error.param)
        except JournalError as error:
            return self._not_accepted(error)
        self._writes += 1
        served.scheduler.accept(request, time.time())
        self.commit()
        return requests.RequestAccepted(request.id)

    async def _accepted(self, message: requests.SubmitRequest, answer: SubmitAnswer) -> SubmitAnswer:
        """Give an answer that promises something once that is on the disk."""
        if isinstance(answer, requests.RequestAccepted):
            try:
                await self._synced()
            except JournalError as error:
                if answer.request_id == message.request_id:
                    self._cancel(message.request_id, "it could not be put on the disk")
                    self.commit()
                return self._not_accepted(error)
        return answer

    def _not_accepted(self, error: JournalError) -> requests.RequestRejected:
        self._journal_failed(error)
        return requests.RequestRejected("unavailable", str(error), retry_after_s=5.0)

    async def query(self, message: requests.QueryRequest) -> DeferredReply[requests.RequestView]:
        """How a request stands."""
        return DeferredReply(self._view(self._find_request(message)))

    async def wait(self, message: requests.WaitRequest) -> DeferredReply[requests.RequestView]:
        """Answer when the request has ended, or at the timeout."""
        return DeferredReply(self._wait(self._find_request(message), message.timeout_s))

    async def cancel(self, message: requests.CancelRequest) -> DeferredReply[requests.RequestView]:
        """Stop a request."""
        request = self._find_request(message)
        self._cancel(request.id, message.reason)
        self.commit()
        return DeferredReply(self._view(request))

    async def list_requests(self, message: requests.ListRequests) -> requests.RequestList:
        """Name the requests of an owner."""
        try:
            after = self._known_by_id(message.after) if message.after else None
            if message.after and (after is None or message.owner not in ("", after.owner)):
                raise RefusedError("not_found", f"there is no request {message.after}")
            ids = self._open_journal.ids(
                message.owner, after=after, limit=message.limit + 1, newest_first=message.newest_first
            )
        except JournalError as error:
            raise RefusedError("unavailable", str(error)) from error
        return requests.RequestList(tuple(ids[: message.limit]), len(ids) > message.limit)

    async def delete(self, message: requests.DeleteRequest) -> DeferredReply[requests.RequestDeleted]:
        """Remove a request for good."""
        return DeferredReply(self._delete(message))

    async def describe(self, message: requests.DescribeModel) -> requests.ModelDescription:
        """What a model takes."""
        return self._describe(self._find_model(message.model))

    async def list_models(self, _: requests.ListModels) -> requests.ModelList:
        """What is served."""
        return requests.ModelList(tuple(self._describe(served) for served in self.models.all))

    def _describe(self, served: ServedModel) -> requests.ModelDescription:
        return served.describe(self.created_at, self.residency.state(served).value)

    async def sleep_model(self, message: SleepModel) -> ModelStatus:
        """Let a model sleep as soon as it has nothing to do."""
        served = self._find_model(message.model)
        if served.model.section.sleep == "never":
            raise RefusedError("never", f'{served.name} never sleeps: its `sleep` is "never"')
        if message.begins:
            self.residency.request_sleep(served)
            self.commit()
        return self._residency_state(served)

    async def wake_model(self, message: WakeModel) -> ModelStatus:
        """Wake a model."""
        served = self._find_model(message.model)
        self.residency.request_wake(served)
        self.commit()
        return self._residency_state(served)

    def _find_model(self, name: str) -> ServedModel:
        """Return the model of that name; raises RefusedError where there is none."""
        if served := self.models.find(name):
            return served
        raise RefusedError("model_not_found", self.models.unknown(name))

    def _residency_state(self, served: ServedModel) -> ModelStatus:
        instances = served.scheduler.registry.instances.values()
        troubles = "; ".join(f"{i.name}: {i.problem}" for i in instances if i.problem)
        weights = sum(i.weights for i in instances if i.awake)
        return ModelStatus(served.name, self.residency.state(served).value, weights, troubles)

    async def cluster(self, _: requests.ClusterQuery) -> requests.ClusterView:
        """Return the ClusterView."""
        reasons = self._not_ready_reasons()
        return requests.ClusterView(
            ready=not reasons,
            reasons=reasons,
            instances=tuple(
                i.view() for scheduler in self.models.schedulers for i in scheduler.registry.instances.values()
            ),
            states=self.models.counts(),
            completed=self.models.completed,
            average_latency_s=self.models.average_latency_s,
            prompt_cache=self.models.prompt_cache(),
            models={served.name: self.residency.state(served).value for served in self.models.all},
        )

    async def reload_model(self, message: ReloadModel) -> DeferredReply[Reloading]:
        """Go over to changed weights."""
        return DeferredReply(self._reload(message.model))

    async def memory_pressure(self, message: pools.MemoryPressure) -> None:
        """A pool is full."""
        wanted = message.nbytes
        for scheduler in self.models.schedulers:
            if wanted > 0:
                wanted -= scheduler.evict(message.pool, wanted)
        for scheduler in self.models.schedulers:
            if wanted > 0:
                scheduler.requeue_stored(message.pool, time.time())
        self.commit()

    # -- the instances' conversation

    async def register(self, message: stages.RegisterInstance) -> stages.InstanceRegistered:
        """An instance offers itself."""
        self._refuse_fenced(message.name, message.generation)
        scheduler = self._scheduler_of(message.name)
        if not scheduler.admit(message.name, message.model):
            raise RefusedError("other_model", _weights_mismatch(message.name))
        unknown = scheduler.register(message, time.time())
        self.log.info("instance joined", instance=message.name, kept=len(message.running) - len(unknown))
        self.spawn(self.effect_runner.watch_instance(message.name, message.generation), name=f"watch {message.name}")
        self.commit()
        return stages.InstanceRegistered(unknown)

    async def heartbeat(self, message: stages.InstanceHeartbeat) -> stages.Acknowledged:
        """An instance's heartbeat."""
        self._refuse_fenced(message.name, message.generation)
        if not self._scheduler_of(message.name).registry.heard(message.name, message.generation, message.trouble):
            raise RefusedError("unknown", f"{message.name} is not registered: register again")
        return stages.Acknowledged()

    async def wake_changed(self, message: stages.InstanceWakeChanged) -> stages.Acknowledged:
        """An instance has woken, or has gone to sleep, or could not."""
        self._refuse_fenced(message.name, message.generation)
        if self._scheduler_of(message.name).wake_changed(message):
            how = "awake" if message.awake else "asleep"
            self.log.info(f"instance {how}", instance=message.name, seconds=round(message.seconds, 3))
        self.commit()
        return stages.Acknowledged()

    async def instance_stopping(self, message: stages.InstanceStopping) -> stages.Acknowledged:
        """An instance was asked to end."""
        self._scheduler_of(message.name).registry.leave(message.name, message.generation)
        return stages.Acknowledged()

    async def blocks_offered(self, message: stages.BlocksOffered) -> None:
        """An instance keeps blocks ready for what is pushed to it."""
        self._scheduler_of(message.instance).registry.offer(message.instance, message.generation, message.blocks)

    async def stage_started(self, message: stages.StageStarted) -> stages.Acknowledged:
        """A stage runs."""
        return self._apply_report(
            message, lambda scheduler, now: scheduler.started(message.attempt, message.instance, message.stage, now)
        )

    async def stage_progress(self, message: stages.StageProgress) -> None:
        """A denoising step is done."""
        for scheduler in self.models.schedulers:
            scheduler.progress(message.attempt, message.step, message.total_steps)

    async def transfer_ready(self, message: stages.TransferReady) -> stages.Acknowledged:
        """Stored tensors are loaded; the stage runs next."""
        return self._apply_report(message, lambda _scheduler, _now: True)

    async def stage_outputs_stored(self, message: stages.StageOutputsStored) -> stages.Acknowledged:
        """A stage's outputs are at rest."""
        if message.stage is Stage.DECODER:
            raise RefusedError("invalid", "what a decoder makes is written, and rests in no pool")
        return self._apply_report(message, lambda scheduler, now: scheduler.stored(message, now))

    async def stage_finished(self, message: stages.StageFinished) -> stages.Acknowledged:
        """An image is done."""
        self._discard_late(message.attempt)
        return self._apply_report(message, lambda scheduler, now: scheduler.finished(message, now))

    async def stage_failed(self, message: stages.StageFailed) -> stages.Acknowledged:
        """A stage raised."""
        return self._apply_report(message, lambda scheduler, now: scheduler.stage_failed(message, now))

    async def transfer_failed(self, message: stages.TransferFailed) -> stages.Acknowledged:
        """Stored tensors could not be fetched."""
        return self._apply_report(message, lambda scheduler, now: scheduler.transfer_failed(message, now))

    async def stage_returned(self, message: stages.StageReturned) -> stages.Acknowledged:
        """An instance that ends gives work back."""
        return self._apply_report(message, lambda scheduler, now: scheduler.returned(message, now))

    async def stage_cancelled(self, message: stages.StageCancelled) -> stages.Acknowledged:
        """Work was dropped as told."""
        self._scheduler_of(message.instance).registry.credit(message.instance, message.issued)
        self._discard_late(message.attempt)
        return self._apply_report(message, lambda _scheduler, _now: True)

    # -- carrying out

    async def _read_model(self, served: ServedModel) -> None:
        """Read a model's serving config. Raises StartError if it is broken, StartDelayedError if its folder is away."""
        model = served.model
        try:
            served.serving_config = load_serving_config(model.path, model.section.task, model.title)
            served.identity = await asyncio.to_thread(lambda: model.identity)
            served.weight_file_bytes = await asyncio.to_thread(weight_file_bytes, model.files)
        except (ModelError, OSError) as error:
            kind = StartError if model.path.is_dir() else StartDelayedError
            raise kind(str(error)) from error
        cached = f"{served.name}, {model.section.dtype}"
        served.scheduler.stored_outputs = StoredOutputs(PromptCache(model.prompt_cache_bytes, cached))

    def _resume(self, request: Request, now: float) -> None:
        """Enter a request that an earlier head has left; what the topology has no place for any more is forgotten."""
        components = self.topology.components
        pools = {component.name for component in components if component.kind == "pool"}
        served, same = self.models.model_for_resumed(request)
        instances = {c.name for c in components if c.slots and c.model == served.key}
        request.model, scheduler = served.key, served.scheduler
        scheduler.resume(request, pools, instances, now)
        if not same:
            scheduler.fail(request.id, OTHER_MODEL, now)
        try:
            check_lora(request.inputs, served.lora_names, served.name)
        except ParameterError as error:
            scheduler.fail(request.id, f"since the topology has changed, {error.param} {error.message}", now)

    def commit(self) -> None:
        """After an event: hand out work, write down what changed, then let it take effect."""
        now = time.time()
        self.residency.update(time.monotonic())
        for scheduler in self.models.schedulers:
            scheduler.dispatch(now)
        self._save_dirty()
        for scheduler in self.models.schedulers:
            self._unnotified += self.effect_runner.carry_out(scheduler.take_effects())
        if self._unnotified and not any(scheduler.dirty for scheduler in self.models.schedulers):
            ended, self._unnotified = self._unnotified, []
            self.spawn(self._notify_waiters(ended), name="tell")

    async def _notify_waiters(self, ended: list[str]) -> None:
        """Wake who waits for the end of a request, once that is on the disk: then the journal answers for it."""
        try:
            await self._synced()
        except JournalError as error:
            self._journal_failed(error)
            self._unnotified += ended
            return
        for scheduler in self.models.schedulers:
            scheduler.forget(ended)
        for request_id in ended:
            if event := self._ended.pop(request_id, None):
                event.set()

    async def _synced(self) -> None:
        """Return when all that has been written until now is on the disk; many wait for one `sync`.

        Raises:
            JournalError: the disk refuses.
        """
        wanted = self._writes
        async with self._syncing:
            if self._synced_writes < wanted:
                written = self._writes
                await asyncio.to_thread(self._open_journal.sync)
                self._synced_writes = written

    def _save_dirty(self) -> None:
        changed = [scheduler for scheduler in self.models.schedulers if scheduler.dirty]
        if self._journal is None or not changed:
            return
        touched, jobs = [], []
        for scheduler in changed:
            ids = {job_id.rpartition("/")[0] for job_id in scheduler.dirty}
            of_it = [scheduler.requests[i] for i in ids if i in scheduler.requests]
            touched += of_it
            jobs += [u for request in of_it for u in request.jobs if u.id in scheduler.dirty]
        try:
            self._journal.save(touched, jobs)
        except JournalError as error:
            # The work itself goes on: what could not be written is still dirty and is tried again at the next event.
            self._journal_failed(error)
            return
        self._writes += 1
        self._journal_recovered()
        for scheduler in changed:
            scheduler.dirty.clear()

    def _all_dirty(self) -> None:
        for scheduler in self.models.schedulers:
            scheduler.dirty.update(scheduler.jobs)

    def _journal_failed(self, error: JournalError) -> None:
        if not self._journal_problem:
            self.log.warning("the journal cannot be written", error=str(error))
        self._journal_problem = str(error)

    def _journal_recovered(self) -> None:
        if self._journal_problem:
            self.log.info("the journal can be written again")
        self._journal_problem = ""

    def _probe(self) -> None:
        """See whether a journal that could not be written can be again, where nothing waits to be written."""
        try:
            self._open_journal.probe()
        except JournalError as error:
            self._journal_failed(error)
        else:
            self._journal_recovered()

    async def _clock_loop(self) -> None:
        # Wall clock time is for people and for the journal: what is decided here is decided by elapsed time.
        awake_at = probed_at = reclaimed_at = written_at = time.monotonic()
        listened_s = 0.0
        resumed = self.models.jobs_count > 0
        while True:
            await asyncio.sleep(TICK_S)
            asleep_at, awake_at = awake_at, time.monotonic()
            heard_s = listening_s(awake_at - asleep_at)
            listened_s += heard_s
            now = time.time()
            for scheduler in self.models.schedulers:
                scheduler.elapse(awake_at - asleep_at, now)
                for name in scheduler.expire_silent(heard_s, now):
                    self.log.warning("instance fenced", instance=name, silent_s=scheduler.heartbeat_timeout_s)
            if resumed and listened_s > self.topology.supervision.heartbeat_timeout_s:
                for scheduler in self.models.schedulers:
                    scheduler.requeue_orphans(now)
                resumed = False
            if not resumed and awake_at - reclaimed_at > RECLAIM_S:
                reclaimed_at = awake_at
                self.spawn(self.effect_runner.reclaim(), name="reclaim")
            if awake_at - written_at > SAVE_TIMEOUTS_EVERY_S:
                written_at = awake_at
                self._all_dirty()
            if self._journal_problem and awake_at - probed_at > PROBE_S:
                probed_at = awake_at
                self._probe()
            self.commit()

    async def _watch_supervisors(self) -> None:
        """Know, for ever, whether what is missing may still come."""
        while True:
            pools = self.effect_runner.pools_missing()
            missing = [served for served in self.models.all if pools or served.scheduler.registry.missing_stages()]
            children = await self._children() if missing else []
            for served in self.models.all:
                served.unavailable_reason = (
                    unavailable_reason(self._components_of(served), children) if served in missing else ""
                )
            await asyncio.sleep(SUPERVISOR_QUERY_EVERY_S)

    def _components_of(self, served: ServedModel) -> list[Component]:
        """The instances of a model, and the pools."""
        return [c for c in self.topology.components if c.kind == "pool" or (c.slots and c.model == served.key)]

    async def _children(self) -> list[ChildReport]:
        children: list[ChildReport] = []
        for name in self.address_book.supervisors():
            try:
                report = await self.reference(name).ask(
                    SupervisorQuery(), SupervisorReport, timeout_s=SUPERVISOR_QUERY_EVERY_S
                )
            except BusError as error:  # a socket that a crash has left
                self.log.debug("no word of a supervisor", supervisor=name, error=str(error))
            else:
                children += report.children
        return children

    async def _prune_loop(self) -> None:
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
        """Raises RefusedError if there is no such model, its files cannot be read, or an instance would not return."""
        chosen = [served for served in self.models.all if name in ("", served.name)]
        if not chosen:
            raise RefusedError("model_not_found", self.models.unknown(name))
        keys = {served.key for served in chosen}
        once = [c.name for c in self.topology.components if c.slots and c.model in keys and c.restart != "permanent"]
        if once:
            raise RefusedError(
                "not_permanent", f'{", ".join(once)} would not restart: their `restart` is not "permanent"'
            )
        versions, stale = list[str](), list[str]()
        for served in chosen:
            model = served.model
            try:
                serving_config = await asyncio.to_thread(
                    load_serving_config, model.path, model.section.task, model.title
                )
                version = await asyncio.to_thread(model_version, model.files)
            except (ModelError, OSError) as error:
                raise RefusedError("model", str(error)) from error
            served.serving_config = serving_config
            versions.append(version)
            stale += served.scheduler.reload(version)
        self.commit()
        return Reloading(", ".join(versions), tuple(stale))

    # -- inside

    @property
    def _journal_path(self) -> Path:
        return self.topology.state_dir / "journal.sqlite"

    def _log_damage(self, damage: str) -> None:
        self.log.error("a request was lost from the journal", damage=damage)

    @property
    def _open_journal(self) -> Journal:
        if self._journal is None:
            raise JournalError("the journal is not open yet")
        return self._journal

    def _request(self, served: ServedModel, message: requests.SubmitRequest, digest: str) -> Request:
        """Raises CardError, naming the input at fault, and JournalError."""
        taken = self.models.scheduler_holding(message.request_id) or self._open_journal.find(message.request_id)
        if not _ID.fullmatch(message.request_id) or taken:
            raise ParameterError("request_id", "must be new, and of at most 64 letters, digits, - and _")
        if not 1 <= message.n <= self.topology.head.max_pending:
            raise ParameterError("n", f"must be from 1 to {self.topology.head.max_pending}")
        # Before the first instance has come, the names that the pipeline takes are not known: then it checks them.
        inputs = cast(
            dict[str, Input], served.serving_config.apply(message.inputs, served.parameters, served.signature.tasks)
        )
        served.serving_config.check_total(inputs, message.n)
        if any(component.kind == "pool" for component in self.topology.components):
            _check_payload(inputs, served.signature, self.topology.transfer.largest_payload)
        output = resolve_output(message.output, served.signature, message.inputs, inputs)
        check_lora(inputs, served.lora_names, served.name)
        now = time.time()
        timeout_s = self.topology.head.request_timeout_s
        seeds = seeds_of(secrets.randbits(32) if message.seed is None else message.seed, message.n)
        id_ = message.request_id
        jobs = [Job(f"{id_}/{k}", id_, k, seed, timeout_s) for k, seed in enumerate(seeds)]
        deadline, key = now + timeout_s, _key(message)
        return Request(
            id_,
            inputs,
            output,
            now,
            deadline,
            jobs,
            key,
            digest,
            owner=message.owner,
            served=served.identity,
            model=served.key,
        )

    def _known(self, message: ByRequestId) -> Request | None:
        """The request that a message is about; None also where it is somebody else's."""
        try:
            request = self._known_by_id(message.request_id)
        except JournalError as error:
            raise RefusedError("unavailable", str(error)) from error
        return request if request and message.owner in ("", request.owner) else None

    def _known_by_id(self, request_id: str) -> Request | None:
        """A request that is active, or whose end may still be untold, else one of the journal. Raises JournalError."""
        return self.models.request(request_id) or self._open_journal.find(request_id)

    def _known_by_key(self, key: str) -> Request | None:
        return (self.models.request_of_key(key) or self._open_journal.find_key(key)) if key else None

    def _cancel(self, request_id: str, reason: str) -> None:
        """Stop what is left of a request; nothing where there is none."""
        if scheduler := self.models.scheduler_holding(request_id):
            scheduler.cancel(request_id, reason, time.time())

    def _find_request(self, message: ByRequestId) -> Request:
        if request := self._known(message):
            return request
        lost = self._journal is not None and self._journal.is_quarantined(message.request_id)
        why = "what the journal had of it was damaged, and has been set aside" if lost else "it may have been forgotten"
        raise RefusedError("not_found", f"there is no request {message.request_id}: {why}")

    async def _delete(self, message: requests.DeleteRequest) -> requests.RequestDeleted:
        request, request_id = self._known(message), message.request_id
        if request is None:
            return requests.RequestDeleted(existed=False)
        self._cancel(request_id, "deleted by the client")
        self.commit()
        used = self._uploads_in_use()
        try:
            # The files first: what is still in the journal after a crash can be deleted again.
            await asyncio.to_thread(self._discard_files, request, used)
            self._open_journal.delete(request_id)
            self._writes += 1
            await self._synced()
        except (JournalError, OSError) as error:
            raise RefusedError("unavailable", f"{request_id} cannot be deleted: {error}") from error
        for scheduler in self.models.schedulers:
            scheduler.forget([request_id])
        self.log.info("request deleted", request_id=request_id)
        return requests.RequestDeleted(existed=True)

    def _discard_late(self, attempt: Attempt) -> None:
        """Remove what an instance has written for a request that was deleted meanwhile."""
        try:
            if self._known_by_id(attempt.job_id.rpartition("/")[0]) is None:
                self.spawn(self._discard(attempt), name="discard")
        except JournalError as error:  # it is pruned by its age
            self.log.warning("artifact not removed", attempt=str(attempt), error=str(error))

    async def _discard(self, attempt: Attempt) -> None:
        try:
            await asyncio.to_thread(self._artifacts.discard, attempt.job_id)
        except (ArtifactError, OSError) as error:  # it is pruned by its age
            self.log.warning("artifact not removed", attempt=str(attempt), error=str(error))

    def _uploads_in_use(self) -> set[Upload]:
        active = [request for scheduler in self.models.schedulers for request in scheduler.requests.values()]
        return {upload for request in active if not request.terminal for upload in _uploads(request)}

    def _discard_files(self, request: Request, needed: set[Upload]) -> None:
        for job in request.jobs:
            self._artifacts.discard(job.id)
        for upload in _uploads(request) - needed:
            self._uploads.discard(upload, saved_before=request.created_at)

    async def _wait(self, request: Request, timeout_s: float) -> requests.RequestView:
        if self.models.scheduler_holding(request.id):
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
            RefusedError: `unavailable` while its end cannot be written down.
        """
        if request.terminal and (scheduler := self.models.scheduler_holding(request.id)):
            not_yet = f"{request.id} has ended, but that is not on the disk"
            if any(job.id in scheduler.dirty for job in request.jobs):
                raise RefusedError("unavailable", f"{not_yet}: {self._journal_problem}")
            try:
                await self._synced()
            except JournalError as error:
                raise RefusedError("unavailable", f"{not_yet}: {error}") from error
        served = self.models.by_key(request.model)
        return request.view(served.name if served else request.model)

    def _not_ready_reasons(self) -> tuple[str, ...]:
        missing = []
        for served in self.models.all:
            of = f" of {served.name}" if len(self.models.all) > 1 else ""
            registry, refused = served.scheduler.registry, served.scheduler.refused
            missing += [f"no {stage}{of} is ready" for stage in registry.missing_stages()]
            if not (registry.missing_stages() or served.has_been_loaded):
                missing.append(f"the weights{of} have not been loaded yet")
            missing += [f"{i.name}: {i.problem}" for i in registry.instances.values() if i.problem]
            missing += [_weights_mismatch(name) for name in refused]
        missing += [f"{pool} is not ready" for pool in self.effect_runner.pools_missing()]
        return (*missing, *([self._journal_problem] if self._journal_problem else []))

    def _refuse_fenced(self, name: str, generation: int) -> None:
        if self._scheduler_of(name).registry.fenced(name, generation):
            raise RefusedError("fenced", f"{name} was given up: its work has gone to others")

    def _scheduler_of(self, instance: str) -> JobScheduler:
        """Return the scheduler of an instance; raises RefusedError for what is none of the topology."""
        if served := self.models.of(instance):
            return served.scheduler
        raise RefusedError("unknown_instance", f"{instance} is no component of this topology")

    def _apply_report(self, report: Report, enter: Callable[[JobScheduler, float], bool]) -> stages.Acknowledged:
        """Enter a report; once this has been answered, the instance may forget it."""
        try:
            current = enter(self._scheduler_of(report.instance), time.time())
        except IllegalTransitionError as error:
            self.log.exception("illegal transition", report=type(report).__name__, attempt=str(report.attempt))
            raise RefusedError("illegal_transition", str(error)) from error
        if not current:
            self.log.info("stale report", report=type(report).__name__, attempt=str(report.attempt))
        self.commit()
        return stages.Acknowledged()


def _weights_mismatch(name: str) -> str:
    return (
        f"{name} has other weights than the rest, because the model's files have changed: `triptych reload` takes them"
    )


def _uploads(request: Request) -> set[Upload]:
    values = request.inputs.values()
    images = {upload for value in values if isinstance(value, Images) for upload in value.files}
    return images | {value.file for value in values if isinstance(value, Tensors)}


def seeds_of(seed: int | tuple[int, ...], n: int) -> list[int]:
    """Return the seed of each of `n` images; raises CardError."""
    if isinstance(seed, tuple):
        if len(seed) != n:
            raise ParameterError("seed", f"must be {n} seeds, one for each of n, not {len(seed)}.")
        return list(seed)
    if seed + n - 1 > MAX_SEED:
        raise ParameterError("seed", f"must be at most {MAX_SEED} for the last image, whose seed is seed + n - 1.")
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
    for name in signature.passes_through:
        images = inputs.get(name)
        pixel_bytes = 1 if name in MASKS else 3
        if isinstance(images, Images) and sum(file.pixels for file in images.files) * pixel_bytes > largest:
            together = " together" if len(images.files) > 1 else ""
            limit = f"must have at most {largest // pixel_bytes} pixels{together}"
            raise ParameterError(
                name, f"{limit}: one stage hands them to the next, in at most {largest} bytes of a pool"
            )
    for name, value in inputs.items():
        if isinstance(value, Tensors) and value.file.nbytes > largest:
            raise ParameterError(name, f"must be at most {largest} bytes: one stage hands them to the next in a pool")


def _digest(message: requests.SubmitRequest) -> str:
    body: tuple[object, ...] = (sorted(message.inputs.items()), message.seed, message.n, message.output)
    if message.model:
        body += (message.model,)
    return hashlib.sha256(msgspec.json.encode(body)).hexdigest()
