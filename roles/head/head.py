"""The head: accepts requests, assigns each stage to an instance with a credit, and brings every request to its end.

The actor only passes messages on: each handler calls the object that decides, and `commit` carries the decisions out.
`scheduler.py` decides about jobs, `request_store.py` has the requests, `model_manager.py` the models, and
`effect_runner.py` sends messages to instances and pools.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import itertools
import time
from collections.abc import Callable, Iterable
from typing import TypeAlias

import msgspec
from prometheus_client.metrics_core import Metric

from triptych.actors import Actor, Component, DeferredReply, StartDelayedError, StartError, Topology
from triptych.actors.errors import UnknownNameError
from triptych.actors.runtime.system_messages import (
    ChildReport,
    SupervisorQuery,
    SupervisorReport,
)
from triptych.actors.topology import agreement
from triptych.bus import BusError, RefusedError
from triptych.engines.stages import Stage
from triptych.roles.head.availability import not_ready_reasons, release_mismatch, weights_mismatch
from triptych.roles.head.effect_runner import EffectRunner
from triptych.roles.head.effects import Effect, NotifyWaiters
from triptych.roles.head.head_metrics import (
    StageTimes,
    count_from_zero,
    head_metrics,
    instance_metrics,
    observe_ended,
)
from triptych.roles.head.job import IllegalTransitionError, Request
from triptych.roles.head.journal import JournalError
from triptych.roles.head.model_manager import ModelManager
from triptych.roles.head.monitor import Monitor
from triptych.roles.head.request_spans import request_spans
from triptych.roles.head.request_store import RequestStore, SubmitAnswer
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.head.served_models import served_models_of
from triptych.roles.messages import pool as pools
from triptych.roles.messages import requests, stages
from triptych.roles.messages.webhooks import TakeWebhooks, WebhookRecorded, WebhooksDue, WebhookTried
from triptych.roles.messages.weights import ModelStatus, Reloading, ReloadModel, SleepModel, WakeModel
from triptych.roles.timeline import JobHistory, Timeline, timeline_of
from triptych.roles.trace_exporter import TraceExporter, exporter_of

Report: TypeAlias = (
    stages.CheckpointStored
    | stages.StageStarted
    | stages.StageOutputsStored
    | stages.StageFinished
    | stages.StageFailed
    | stages.TransferFailed
    | stages.StageReturned
    | stages.StageCancelled
)
TICK_S = 0.25
RECLAIM_EVERY_S = 5.0
"""Seconds between two searches for blocks that no job needs."""
SAVED_PARTS = 40
"""Ticks, 10 s, from one write of the time that a request has left to the next; each writes a part of the requests."""
PRUNE_EVERY_S = 60.0
SUPERVISOR_QUERY_EVERY_S = 1.0
"""Seconds between two queries of the supervisors while a component is missing, and the timeout of a query."""
PROBE_EVERY_S = 1.0
"""Seconds between two checks whether a failed journal can be written again."""


def build(component: Component, topology: Topology) -> list[Actor]:
    """Make the actors of the head's process."""
    exporter = exporter_of(component, topology)
    timeline, writers = timeline_of(component, topology, exporter)
    return [Head(topology, timeline, exporter), *writers]


class Head(Actor):
    """The head actor, one per cluster: receives the messages of clients and the reports of instances."""

    def __init__(
        self, topology: Topology, timeline: Timeline | None = None, exporter: TraceExporter | None = None
    ) -> None:
        super().__init__("head")
        self.topology = topology
        self.timeline = timeline or Timeline()
        self._exporter = exporter
        self.models = served_models_of(topology)
        self._version = importlib.metadata.version("triptych")
        self._mismatches: dict[str, str] = {}  # why instances were refused, by name
        self._stage_times = StageTimes()
        self.requests = RequestStore(self, topology, self.models)
        self.model_manager = ModelManager(topology, self.models)
        pool_names = tuple(c.name for c in topology.components if c.kind == "pool")
        self.effect_runner = EffectRunner(
            self, self.models, notify=self.requests.notify_waiters, on_outcome=self.commit
        )
        self._group = _Group()
        self._unwritten: list[_Group] = []
        """Earlier ones, while the journal cannot be written."""
        self.monitor = Monitor(self, self.models, pool_names, self.effect_runner, self.commit)

    async def started(self) -> None:
        """Read the models and the journal, resume its requests, and start the timers.

        Raises:
            StartError: The journal is corrupt or of a newer version, or a model is broken.
            StartDelayedError: The journal is locked, the disk is full, or the folder of a model is missing.
        """
        await self.model_manager.read()
        count_from_zero(served.name for served in self.models.all)
        try:
            await self.requests.open()
        except JournalError as error:
            raise (StartDelayedError if error.transient else StartError)(str(error)) from error
        if self.models.jobs_count:
            self.log.info("resumed from the journal", jobs=self.models.jobs_count)
        self.spawn(self._clock_loop(), name="clock")
        self.spawn(self._prune_loop(), name="prune")
        self.spawn(self._watch_supervisors(), name="supervisors")
        self.monitor.watch_pools()
        self.commit()  # writes the requests that could not be resumed, before clients query them

    async def stopping(self) -> None:
        """Write all active jobs; the instances go on with their attempts."""
        self.requests.save_all()
        await self.requests.close()

    def stats(self) -> dict[str, int | float | str | bool]:
        """Return the number of requests in the journal that could not be read."""
        return {"journal_damaged": self.requests.damaged}

    def metrics(self) -> Iterable[Metric]:
        """Return the jobs that wait and run, the work that waits, the prompt cache, and the instances."""
        active = ((self._model_name(request), request) for request in self.models.requests.values())
        names = [served.name for served in self.models.all]
        instances = ((served.name, view) for served in self.models.all for view in served.scheduler.instance_views())
        yield from head_metrics(active, names, self._stage_times, self.models.prompt_cache())
        yield from instance_metrics(names, instances)

    def caught_up(self) -> None:
        """Write the requests that were accepted and the reports that came, together, and carry out what follows."""
        if not self._group.changed:
            return
        group, self._group = self._group, _Group()
        if self.requests.has_accepted:
            try:
                self.requests.write_accepted()
            except JournalError as error:
                group.refused = error
        self._unwritten.append(group)
        self._decide()
        self.effect_runner.run(each for scheduler in self.models.schedulers for each in scheduler.take_assignments())
        # The next stages wait for these messages, whose tasks have just been made: all else comes after them. A head
        # that ends in between has a successor that does not know of them, and has the instances drop the attempts.
        self.spawn(self._finish(group), name="commit")

    async def _finish(self, group: _Group) -> None:
        self._write_and_run_effects()
        group.accepted.set()

    def commit(self) -> None:
        """Carry out decisions: assign jobs, write changes to the journal, then run the effects."""
        self._decide()
        self._write_and_run_effects()

    def _decide(self) -> None:
        now = time.time()
        self.model_manager.residency.update(time.monotonic())
        for scheduler in self.models.schedulers:
            scheduler.dispatch(now)

    def _write_and_run_effects(self) -> None:
        """Write changes to the journal, then run the effects.

        Reports are acknowledged once they are written; while the journal cannot be written, they come again.
        """
        written = self.requests.save()
        effects = [effect for scheduler in self.models.schedulers for effect in scheduler.take_effects()]
        self._record_ended(effects)
        self.effect_runner.run(effects)
        if written and self._unwritten:
            groups, self._unwritten = self._unwritten, []
            for group in groups:  # after the effects' messages, whose tasks have just been made
                asyncio.get_running_loop().call_soon(group.written.set)

    def _record_ended(self, effects: Iterable[Effect]) -> None:
        """Count the requests that have ended, and record their histories."""
        for effect in effects:
            if isinstance(effect, NotifyWaiters) and (request := self.models.request(effect.request_id)):
                observe_ended(self._model_name(request), request, self._stage_times)
                if self._exporter:
                    self._exporter.export(request_spans(request, self._model_name(request), self._kind_of))
                for job in request.jobs if self.timeline.on else ():
                    moves = tuple((each.state, each.at) for each in job.history)
                    self.timeline.add(JobHistory(job=job.id, states=moves))

    def _kind_of(self, instance: str) -> str:
        try:
            return self.topology.component(instance).kind
        except UnknownNameError:  # of an earlier topology
            return "attempt"

    def _model_name(self, request: Request) -> str:
        served = self.models.by_key(request.model)
        return served.name if served else request.model

    # -- clients: requests

    async def submit(self, message: requests.SubmitRequest) -> DeferredReply[SubmitAnswer]:
        """Accept a request: check it; `caught_up` writes it to the journal and starts it."""
        answer = self.requests.accept(message)
        self._group.changed |= self.requests.has_accepted
        return DeferredReply(self._once_durable(message, answer, self._group))

    async def _once_durable(self, message: requests.SubmitRequest, answer: SubmitAnswer, group: _Group) -> SubmitAnswer:
        """Return the answer once the request is on the disk."""
        if isinstance(answer, requests.RequestRejected):
            return answer
        if group.changed:
            await group.accepted.wait()
        if group.refused:
            return self.requests.not_accepted(group.refused)
        try:
            await self.requests.synced()
        except JournalError as error:
            if answer.request_id == message.request_id:
                self.requests.cancel(message.request_id, "it could not be put on the disk")
                self.commit()
            return self.requests.not_accepted(error)
        if message.wants_view:
            request = self.requests.find(requests.QueryRequest(answer.request_id))
            return msgspec.structs.replace(answer, view=await self.requests.view(request))
        return answer

    async def query(self, message: requests.QueryRequest) -> DeferredReply[requests.RequestView]:
        """Return the view of a request."""
        return DeferredReply(self.requests.view(self.requests.find(message)))

    async def wait(self, message: requests.WaitRequest) -> DeferredReply[requests.RequestView]:
        """Answer when a request has ended, or has changed if that is asked for, or at the timeout."""
        return DeferredReply(self.requests.wait(self.requests.find(message), message.timeout_s, message.revision))

    async def cancel(self, message: requests.CancelRequest) -> DeferredReply[requests.RequestView]:
        """Cancel a request."""
        request = self.requests.find(message)
        self.requests.cancel(request.id, message.reason)
        self.commit()
        return DeferredReply(self.requests.view(request))

    async def list_requests(self, message: requests.ListRequests) -> requests.RequestList:
        """List the requests of an owner."""
        return self.requests.page(message)

    async def delete(self, message: requests.DeleteRequest) -> DeferredReply[requests.RequestDeleted]:
        """Delete a request; an active one is cancelled first."""
        request = self.requests.find_owned(message)
        if request:
            self.requests.cancel(request.id, "deleted by the client")
            self.commit()
        return DeferredReply(self.requests.delete(request))

    # -- webhooks

    async def take_webhooks(self, message: TakeWebhooks) -> DeferredReply[WebhooksDue]:
        """Answer with the webhooks that are due, when there are some or at the timeout."""
        return DeferredReply(self.requests.take_webhooks(message))

    async def webhook_tried(self, message: WebhookTried) -> WebhookRecorded:
        """Record an attempt to send a webhook."""
        return self.requests.webhook_tried(message)

    # -- clients: models and the cluster

    async def describe(self, message: requests.DescribeModel) -> requests.ModelDescription:
        """Describe a model."""
        return self.model_manager.describe(message.model)

    async def list_models(self, _: requests.ListModels) -> requests.ModelDescriptions:
        """Describe every model."""
        return self.model_manager.describe_all()

    async def sleep_model(self, message: SleepModel) -> ModelStatus:
        """Let a model sleep as soon as it is idle."""
        self.model_manager.sleep(message)
        self.commit()
        return self.model_manager.status(message.model)

    async def wake_model(self, message: WakeModel) -> ModelStatus:
        """Wake a model."""
        self.model_manager.wake(message.model)
        self.commit()
        return self.model_manager.status(message.model)

    async def reload_model(self, message: ReloadModel) -> DeferredReply[Reloading]:
        """Change to the weights of a model that are on disk now."""
        return DeferredReply(self._reload(message.model))

    async def _reload(self, name: str) -> Reloading:
        answer = await self.model_manager.reload(name)
        self.commit()
        return answer

    async def cluster(self, _: requests.ClusterQuery) -> requests.ClusterView:
        """Return the state of the cluster."""
        reasons = not_ready_reasons(
            self.models, self.monitor.pools_missing(), self.requests.journal_problem, self._mismatches.values()
        )
        return requests.ClusterView(
            ready=not reasons,
            reasons=reasons,
            instances=self.models.instance_views(),
            states=self.models.counts(),
            completed=self.models.completed,
            average_latency_s=self.models.average_latency_s,
            prompt_cache=self.models.prompt_cache(),
            models=self.model_manager.states(),
        )

    # -- pools

    async def memory_pressure(self, message: pools.MemoryPressure) -> None:
        """Free memory in a full pool."""
        if message.checkpoints:
            self.models.evict_checkpoints(message.pool, message.nbytes)
        else:
            self.models.make_room(message.pool, message.nbytes, time.time())
        self.commit()

    # -- instances

    async def hello(self, message: stages.Hello) -> stages.Acknowledged:
        """Refuse an instance of another version, or one that has read another topology."""
        name, generation = self._instance()
        self._refuse_fenced(name, generation)
        head = self.topology.component("head")
        mismatch = release_mismatch(
            name, message, host=head.host, version=self._version, topology=agreement(self.topology, name)
        )
        self._mismatches.pop(name, None)
        if mismatch:
            self._mismatches[name] = mismatch
            self.log.warning("instance refused", instance=name, reason=mismatch)
            raise RefusedError("other_release", mismatch)
        return stages.Acknowledged()

    async def register(self, message: stages.RegisterInstance) -> stages.InstanceRegistered:
        """Register an instance."""
        self._refuse_fenced(message.name, message.generation)
        scheduler = self._scheduler_of(message.name)
        if not scheduler.admit(message.name, message.model):
            raise RefusedError("other_model", weights_mismatch(message.name))
        unknown = scheduler.register(message, time.time())
        served = self.models.of(message.name)
        for problem in served.new_misspellings() if served else ():
            self.log.warning("the serving config has a name that is ignored", problem=problem)
        self.log.info("instance joined", instance=message.name, kept=len(message.running) - len(unknown))
        self.monitor.watch_instance(message.name, message.generation)
        self.commit()
        return stages.InstanceRegistered(unknown)

    async def heartbeat(self, message: stages.InstanceHeartbeat) -> stages.Acknowledged:
        """Record a heartbeat of an instance."""
        name, generation = self._instance()
        self._refuse_fenced(name, generation)
        if not self._scheduler_of(name).registry.heard(name, generation, message.trouble):
            raise RefusedError("unknown", f"{name} is not registered: register again")
        return stages.Acknowledged()

    async def wake_changed(self, message: stages.InstanceWakeChanged) -> stages.Acknowledged:
        """Record that an instance has woken, has gone to sleep, or failed to wake."""
        name, generation = self._instance()
        self._refuse_fenced(name, generation)
        if self._scheduler_of(name).wake_changed(name, generation, message):
            how = "awake" if message.awake else "asleep"
            self.log.info(f"instance {how}", instance=name, seconds=round(message.seconds, 3))
        self.commit()
        return stages.Acknowledged()

    async def instance_stopping(self, _: stages.InstanceStopping) -> stages.Acknowledged:
        """Record that an instance was asked to end."""
        name, generation = self._instance()
        self._scheduler_of(name).registry.leave(name, generation)
        return stages.Acknowledged()

    async def blocks_offered(self, message: stages.BlocksOffered) -> None:
        """Record the preallocated blocks of an instance."""
        name, generation = self._instance()
        self._scheduler_of(name).registry.offer(name, generation, message.blocks)

    async def stage_started(self, message: stages.StageStarted) -> None:
        """Record that a stage runs.

        Nothing follows from it, so it is written with the next change, or at the next tick. If this head ends before,
        the instance says it again to the next one.
        """
        self._record(
            message,
            lambda scheduler, name, now: scheduler.started(message.attempt, name, message.stage, now, message.waited_s),
        )

    async def stage_progress(self, message: stages.StageProgress) -> None:
        """Record a finished denoising step."""
        for scheduler in self.models.schedulers:
            scheduler.progress(message.attempt, message.step, message.total_steps, time.time())
        self.requests.notify_watchers([message.attempt.job_id.rpartition("/")[0]])

    async def stage_outputs_stored(self, message: stages.StageOutputsStored) -> DeferredReply[stages.Acknowledged]:
        """Advance a job whose stage has stored its outputs."""
        if message.stage is Stage.DECODER:
            raise RefusedError("invalid", "a decoder writes an artifact, and stores no outputs in a pool")
        return self._apply_report(message, lambda scheduler, name, now: scheduler.stored(name, message, now))

    async def preview_stored(self, message: stages.PreviewStored) -> stages.Acknowledged:
        """Keep a preview for a decoder."""
        name, _ = self._instance()
        self._scheduler_of(name).preview_stored(name, message)
        self.commit()
        return stages.Acknowledged()

    async def checkpoint_stored(self, message: stages.CheckpointStored) -> DeferredReply[stages.Acknowledged]:
        """Record what a denoise has made so far."""
        return self._apply_report(message, lambda scheduler, name, _now: scheduler.checkpoint_stored(name, message))

    async def stage_finished(self, message: stages.StageFinished) -> DeferredReply[stages.Acknowledged]:
        """Complete a job whose artifact is written."""
        answer = self._apply_report(message, lambda scheduler, name, now: scheduler.finished(name, message, now))
        self.requests.discard_late(message.attempt)
        return answer

    async def stage_failed(self, message: stages.StageFailed) -> DeferredReply[stages.Acknowledged]:
        """Retry or fail a job whose stage raised."""
        return self._apply_report(message, lambda scheduler, name, now: scheduler.stage_failed(name, message, now))

    async def transfer_failed(self, message: stages.TransferFailed) -> DeferredReply[stages.Acknowledged]:
        """Retry a job whose stored tensors could not be fetched."""
        return self._apply_report(message, lambda scheduler, name, now: scheduler.transfer_failed(name, message, now))

    async def stage_returned(self, message: stages.StageReturned) -> DeferredReply[stages.Acknowledged]:
        """Let a job wait again that an instance returned because it ends, or parked."""
        return self._apply_report(message, lambda scheduler, name, now: scheduler.returned(name, message, now))

    async def stage_cancelled(self, message: stages.StageCancelled) -> DeferredReply[stages.Acknowledged]:
        """Record that an attempt was cancelled."""
        self.requests.discard_late(message.attempt)
        return self._apply_report(message, lambda scheduler, name, _now: scheduler.cancelled(name, message))

    def _apply_report(
        self, report: Report, apply: Callable[[JobScheduler, str, float], bool]
    ) -> DeferredReply[stages.Acknowledged]:
        """Apply a report to its scheduler, for `caught_up`; the answer lets the instance forget the report.

        It is sent after the messages that follow from the report, which the next stage waits for.
        """
        self._record(report, apply)
        self._group.changed = True
        return DeferredReply(_acknowledged(self._group))

    def _record(self, report: Report, apply: Callable[[JobScheduler, str, float], bool]) -> None:
        name, _ = self._instance()
        try:
            current = apply(self._scheduler_of(name), name, time.time())
        except IllegalTransitionError as error:
            self.log.exception("illegal transition", report=type(report).__name__, attempt=str(report.attempt))
            raise RefusedError("illegal_transition", str(error)) from error
        if not current:
            self.log.info("stale report", report=type(report).__name__, attempt=str(report.attempt))

    def _instance(self) -> tuple[str, int]:
        """Return the name and the generation of the instance that sent the message."""
        return self.address_book.component_of(self.sender.name), self.sender.generation

    def _refuse_fenced(self, name: str, generation: int) -> None:
        if self._scheduler_of(name).registry.fenced(name, generation):
            raise RefusedError("fenced", f"{name} was given up: other instances have its jobs")

    def _scheduler_of(self, instance: str) -> JobScheduler:
        """Return the scheduler of an instance; raises RefusedError if the topology has no such instance."""
        if served := self.models.of(instance):
            return served.scheduler
        raise RefusedError("unknown_instance", f"{instance} is no component of this topology")

    # -- time

    async def _clock_loop(self) -> None:
        # Decisions use elapsed time; wall clock time is only for views and the journal.
        awake_at = probed_at = reclaimed_at = time.monotonic()
        listened_s = 0.0
        resumed = self.models.jobs_count > 0
        for part in itertools.cycle(range(SAVED_PARTS)):
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
            if not resumed and awake_at - reclaimed_at > RECLAIM_EVERY_S:
                reclaimed_at = awake_at
                self.spawn(self.monitor.reclaim(), name="reclaim")
            self.requests.check_synced()  # it crashes this head: the next one reads what there is
            self.requests.save_part(part, SAVED_PARTS)  # thousands at once would keep the head for a second
            if self.requests.journal_problem and awake_at - probed_at > PROBE_EVERY_S:
                probed_at = awake_at
                self.requests.probe()
            self.commit()

    async def _prune_loop(self) -> None:
        while True:
            await self.requests.prune()
            await asyncio.sleep(PRUNE_EVERY_S)

    async def _watch_supervisors(self) -> None:
        """Keep track of whether missing components may still start."""
        while True:
            missing = self.model_manager.missing(self.monitor.pools_missing())
            self.model_manager.update_availability(missing, await self._children() if missing else ())
            await asyncio.sleep(SUPERVISOR_QUERY_EVERY_S)

    async def _children(self) -> list[ChildReport]:
        """Return the child reports of all supervisors."""
        reports = await asyncio.gather(*(self._report_of(name) for name in self.address_book.supervisors()))
        return [child for report in reports if report for child in report.children]

    async def _report_of(self, supervisor: str) -> SupervisorReport | None:
        try:
            return await self.reference(supervisor).ask(
                SupervisorQuery(), SupervisorReport, timeout_s=SUPERVISOR_QUERY_EVERY_S
            )
        except BusError as error:  # its host is away, or it has crashed and left its socket
            self.log.debug("a supervisor does not answer", supervisor=supervisor, error=str(error))
            return None


class _Group:
    """The requests and reports since the last `caught_up`, which go to the journal in one transaction."""

    def __init__(self) -> None:
        self.changed = False
        self.accepted = asyncio.Event()
        """Set once the requests are in the journal, or are refused."""
        self.refused: JournalError | None = None
        """Why the requests could not be written."""
        self.written = asyncio.Event()
        """Set once the reports are in the journal."""


async def _acknowledged(group: _Group) -> stages.Acknowledged:
    await group.written.wait()
    return stages.Acknowledged()


def listening_s(slept_s: float) -> float:
    """Return how many of the seconds between two ticks count as seconds in which the head could receive heartbeats.

    A late tick counts for at most two ticks: while this process or the machine was stopped, it received no heartbeats,
    and earlier ones may still be in its mailbox.
    """
    return min(slept_s, 2 * TICK_S)
