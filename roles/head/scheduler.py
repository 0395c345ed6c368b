"""The head's decisions about the jobs of a model. Pure: no clock, no socket, no disk.

Each method for an event changes the state and queues effects, which the effect runner carries out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeAlias

from triptych.engines.memory.buddy import block_bytes
from triptych.engines.parameters.schema import Signature
from triptych.engines.stages import Stage
from triptych.roles.head import runs
from triptych.roles.head.dispatcher import Dispatcher
from triptych.roles.head.effects import (
    Assign,
    Cancel,
    Effect,
    NotifyWaiters,
    RestartInstance,
    SetInstanceAwake,
)
from triptych.roles.head.job import DONE, RUNNING, UPSTREAM, WAITING, Job, Request, State
from triptych.roles.head.previews import Preview
from triptych.roles.head.registry import ExitCause
from triptych.roles.head.rolling_restart import next_to_restart
from triptych.roles.head.scheduling_state import SchedulingState
from triptych.roles.messages.common import Attempt, LeaseRef
from triptych.roles.messages.requests import InstanceView, PreviewView
from triptych.roles.messages.stages import (
    CheckpointStored,
    InstanceWakeChanged,
    PreviewStored,
    RegisterInstance,
    StageCancelled,
    StageFailed,
    StageFinished,
    StageOutputsStored,
    StageReturned,
    TransferFailed,
)
from triptych.roles.previews import denoise_of

AttemptEnded: TypeAlias = StageFailed | StageReturned | StageCancelled | TransferFailed
"""The reports of an attempt that has made nothing."""

MAX_DEATHS = 2
"""A job that was running alone this often when its instance crashed counts as the cause, and fails. For a suspect,
which has brought down instances among others before, once is enough."""

MAX_STALLS = 5
"""Instances stall because their machine does, but a job that stalls every instance must fail in the end."""

STALLED_AFTER = 0.5
"""Silence, in heartbeat timeouts, from which on a lost connection counts as a stall, not a crash."""

MAX_TRANSFERS_LOST = 10
"""A lost transfer does not count as a failure of the job, but with faulty memory the job must fail in the end."""

DRAINING = ("draining", "stopping")
"""Error codes of an instance that refuses jobs because it ends."""

UNCOUNTED_REFUSALS = (*DRAINING, "asleep", "no_credit", "block_gone", "cancelled", "mailbox_full", "deadline_exceeded")
"""Error codes of refusals that do not count as failures: the attempt was not started."""


def _why_convicted(job: Job, name: str) -> str:
    others = f"after {job.shared_deaths} instances that died while they computed it among others"
    return f"{name} died while it computed this job alone, {others}"


class JobScheduler(SchedulingState):
    """The decisions about the requests, jobs and instances of one model."""

    # -- clients

    def accept(self, request: Request, now: float) -> None:
        """Add a request that is in the journal; jobs that are still pending start to wait."""
        self.requests[request.id] = request
        if request.idempotency_key:
            self.by_key[request.idempotency_key] = request
        for job in request.jobs:
            if job.state is State.PENDING:
                job.begin(now)
                self.dirty.add(job.id)
            if not job.terminal:
                self.add(job)

    def resume(self, request: Request, pools: Collection[str], instances: Collection[str], now: float) -> None:
        """Add an active request of an earlier head.

        Stored outputs and assignments are dropped if their pool or instance does not exist any more; the job then
        restarts, with the same seed, from the last stage whose inputs are stored.
        """
        moved = []
        for job in request.jobs:
            lost = job.lease is not None and job.lease.pool not in pools
            if lost:
                job.forget_stored()
            if job.checkpoint and job.checkpoint.payload.lease.pool not in pools:
                job.checkpoint = None
            if not job.terminal and (lost or (job.instance and job.instance not in instances)):
                moved.append(job)
        self.accept(request, now)
        for job in moved:
            self._retry(job, "the topology has changed", now, counts=False)

    def cancel(self, request_id: str, reason: str, now: float) -> None:
        """Cancel the active jobs of a request; no-op if there is no such request."""
        self._stop_all(request_id, State.CANCELLED, reason, now)

    def fail(self, request_id: str, reason: str, now: float) -> None:
        """Fail the active jobs of a request that cannot be served any more."""
        self._stop_all(request_id, State.FAILED, reason, now)

    def _stop_all(self, request_id: str, state: State, reason: str, now: float) -> None:
        request = self.requests.get(request_id)
        for job in request.jobs if request else ():
            if not job.terminal:
                self._stop(job, state, reason, now)

    # -- instances

    def admit(self, name: str, model: str) -> bool:
        """Return whether an instance has the weights for new jobs; the first instance decides which these are."""
        others = {i.model for i in self.registry.instances.values() if i.name != name}
        if model == self.model or (self.reloading and model in others):
            self.refused.pop(name, None)
            return True
        if self.model in others:
            self.refused[name] = model
            return False
        self._go_over_to(model)
        return True

    def reload(self, model: str) -> tuple[str, ...]:
        """Use other weights for new jobs; return the names of the instances that restart for this, one by one."""
        if model != self.model:
            self._go_over_to(model)
        stale = {i.name for i in self.registry.instances.values() if i.model != model}
        self.reloading = bool(stale)
        return tuple(sorted(stale | ({self.restarting} if self.restarting else set())))

    def register(self, registration: RegisterInstance, now: float) -> tuple[Attempt, ...]:
        """Add an instance; return the attempts that it has and must drop."""
        self.registry.register(registration)
        if registration.name == self.restarting and registration.model == self.model:
            self.restarting = ""
        if registration.awake or registration.weights:
            self._update_signature(registration.kind, registration.signature)
        assigned = set(registration.running)
        for job in self.jobs.on(registration.name):
            if job.current_attempt not in assigned:
                self._retry(job, f"{registration.name} came back without it", now, counts=False)
        self._drop_previews(p for p in self.previews.on(registration.name) if p.attempt not in assigned)
        return tuple(w for w in registration.running if not self.is_current(w, registration.name))

    def _update_signature(self, kind: str, signature: Signature) -> None:
        """Record which inputs encoders read; an encoder that has never loaded its weights does not know."""
        if kind == Stage.ENCODER and self.stored_outputs.cache.update_signature(signature):
            self.clear_cache()

    def set_awake(self, names: Iterable[str], *, awake: bool) -> None:
        """Tell instances to sleep or wake, unless they are doing so already."""
        for name in names:
            instance = self.registry.instances[name]
            if instance.awake != awake and not instance.changing_to:
                instance.changing_to = "wake" if awake else "sleep"
                self.registry.note_change(name)
                self.effects.append(SetInstanceAwake(name, awake))

    def wake_changed(self, name: str, generation: int, report: InstanceWakeChanged) -> bool:
        """Record that an instance has gone to sleep, has woken, or failed to wake."""
        instance = self.registry.incarnation(name, generation)
        if instance is None:
            return False
        instance.changing_to = ""
        instance.awake = report.awake
        instance.wake_error = report.trouble
        self.registry.note_change(name)
        if report.awake:
            instance.signature, instance.weights = report.signature, report.weights
            self._update_signature(instance.kind, report.signature)
        return True

    def wake_change_failed(self, name: str, generation: int) -> None:
        """Record that an instance could not be told to sleep or wake, or refused."""
        if instance := self.registry.incarnation(name, generation):
            instance.changing_to = ""
            self.registry.note_change(name)

    @property
    def begun(self) -> bool:
        """Return whether a job is under way: assigned to an instance, or between two stages."""
        return self.jobs.begun > 0

    def instance_views(self) -> tuple[InstanceView, ...]:
        """Return what clients may see of the instances."""
        return tuple(i.view(job.id for job in self.jobs.on(i.name)) for i in self.registry.instances.values())

    @property
    def waiting_s(self) -> float | None:
        """Return the seconds that the oldest unassigned job has waited; None if there is none."""
        since = self.jobs.unassigned_since
        return None if since is None else self.jobs.clock.now - since

    def instance_down(self, name: str, cause: str, now: float, end: ExitCause = ExitCause.CRASHED) -> None:
        """Remove an instance that has ended, and retry its jobs.

        Only a crash counts as a failure of the job, and not while it computed several: one of them may be the cause.
        """
        self.registry.remove(name)
        assigned = self.jobs.on(name)
        computed = sum(job.running for job in assigned)
        crashed = end is ExitCause.CRASHED
        if crashed and computed > 1:
            cause += f" while it computed {computed} jobs"
        for job in assigned:
            shared = crashed and job.running and computed > 1
            died = crashed and job.running and not shared
            fatal = _why_convicted(job, name) if died and job.suspect else ""
            job.shared_deaths += shared
            job.deaths += died
            job.stalls += job.running and end is ExitCause.STALLED
            self._retry(job, f"{name}: {cause}", now, counts=crashed and not shared, fatal=fatal)
        self._drop_previews(self.previews.on(name))

    def connection_lost(self, name: str, generation: int, now: float) -> bool:
        """Handle the end of an incarnation's process; return False if it is not registered any more."""
        instance = self.registry.incarnation(name, generation)
        if instance is None:
            return False
        end = instance.end(STALLED_AFTER * self.heartbeat_timeout_s)
        self.instance_down(name, end.value, now, end)
        return True

    def expire_silent(self, seconds: float, now: float) -> list[str]:
        """Add `seconds` of listening; fence the instances that were silent for too long and return their names."""
        silent = self.registry.silent(seconds, self.heartbeat_timeout_s)
        for instance in silent:
            self.registry.fence(instance.name, instance.generation)
            cause = f"not heard of for {self.heartbeat_timeout_s:g} s"
            self.instance_down(instance.name, cause, now, ExitCause.STALLED)
        return [instance.name for instance in silent]

    def pool_down(self, pool: str, older_than: int, now: float) -> None:
        """Handle the loss of the tensors stored in earlier generations of a pool."""
        losers = self.stored_outputs.lose(pool, older_than)
        self.jobs.refile_all()  # others may have lost their checkpoints
        for job in losers:
            self.changed(job)
            # The instance that has the job may have loaded it already, and reports if it has not.
            if not job.instance:
                self._retry(job, f"{pool}: its stored tensors are gone", now, counts=False)
        self._drop_previews(p for p in self.previews.stored_in(pool) if p.payload.lease.pool_generation < older_than)

    def evict(self, pool: str, nbytes: int) -> int:
        """Release cached outputs in a pool that has no free block; return the bytes released."""
        leases = self.stored_outputs.evict(pool, nbytes)
        self.give_back(leases)
        return sum(block_bytes(lease.nbytes) for lease in leases)

    def evict_checkpoints(self, pool: str, nbytes: int) -> int:
        """Release previews that wait, and checkpoints, in a pool that has no free block; return the bytes released."""
        dropped = self._drop_previews(p for p in self.previews.stored_in(pool) if not p.instance)
        freed = sum(block_bytes(lease.nbytes) for lease in dropped)
        before = [job for job in self.jobs.values() if job.checkpoint]
        leases = self.stored_outputs.evict_checkpoints(pool, nbytes - freed)
        for job in before:
            if not job.checkpoint:
                self.changed(job)
        self.give_back(leases)
        return freed + sum(block_bytes(lease.nbytes) for lease in leases)

    def requeue_stored(self, pool: str, now: float) -> None:
        """Restart jobs whose tensors fill a pool while all instances of the model are asleep.

        Jobs of other models need the pool, and may have to end before this model's weights fit into memory.
        """
        instances = self.registry.instances.values()
        if not instances or any(instance.awake for instance in instances):
            return
        for job in list(self.jobs.values()):
            if not job.instance and job.lease and job.lease.pool == pool:
                self.give_back(self.stored_outputs.drop(job))
                self._retry(job, f"{pool} was full, and its model is asleep", now, counts=False)

    def clear_cache(self) -> None:
        """Empty the prompt cache."""
        self.give_back(self.stored_outputs.clear())
        for request in self.requests.values():
            request.prompt_key = b""
        self.jobs.refile_all()

    def requeue_orphans(self, now: float) -> None:
        """Retry the jobs that no instance has claimed after a restart of the head."""
        for job in list(self.jobs.values()):
            if job.instance and job.instance not in self.registry.instances:
                self._retry(job, f"{job.instance} did not come back", now, counts=False)

    # -- reports: each returns False when it is about an attempt that no longer counts

    def attempt_refused(self, name: str, attempt: Attempt, code: str, cause: str, now: float) -> None:
        """Handle an attempt that the instance refused, with the code of a bus error or `AttemptRefusedError`."""
        if code in DRAINING:
            self.registry.drain(name)
        if code != "no_credit":
            self.registry.refund(name, self.registry.generation(name))
        self._forget_preview(attempt)
        if job := self.jobs.find(attempt, name):
            self._retry(job, f"{name}: {cause}", now, counts=code not in UNCOUNTED_REFUSALS)

    def started(self, attempt: Attempt, name: str, stage: Stage, now: float, waited_s: float = 0.0) -> bool:
        """Record that the stage runs, for which its instance had the inputs since `waited_s` seconds."""
        if self.previews.find(attempt, name):
            return True
        job = self.jobs.find(attempt, name)
        if job is None:
            return False
        if job.state is not RUNNING[stage]:
            job.advance(RUNNING[stage], now)
        job.instances[stage.value] = name
        runs.start(job.runs, stage, now, waited_s)
        self.changed(job)
        return True

    def progress(self, attempt: Attempt, step: int, total_steps: int, now: float) -> None:
        """Record a finished denoising step."""
        job = self.jobs.get(attempt.job_id)
        if job and job.attempt == attempt.number:
            if step <= job.resumed_from:  # it could not load the checkpoint
                job.steps_redone += job.resumed_from
                job.resumed_from = 0
            if step > job.step:  # else one that was overtaken
                runs.step(job.runs, step, now)
            job.step, job.total_steps = step, total_steps

    def checkpoint_stored(self, instance: str, report: CheckpointStored) -> bool:
        """Record the newest checkpoint of a denoise."""
        lease = report.stored.lease
        job = self.jobs.find(report.attempt, instance)
        if job is None or job.stage is not Stage.DENOISER:
            if not self.stored_outputs.needs(lease):
                self.give_back((lease,))
            return False
        if job.checkpoint and job.checkpoint.payload.lease == lease:  # told again
            return True
        self.give_back(self.stored_outputs.put_checkpoint(job, report.step, report.stored))
        self.changed(job)
        return True

    def stored(self, instance: str, report: StageOutputsStored, now: float) -> bool:
        """Record stored outputs; the job waits for its next stage."""
        stage = report.stage
        self.registry.credit(instance, report.issued)
        job = self.jobs.find(report.attempt, instance)
        if job is None or job.stage is not stage:
            if not self.stored_outputs.needs(report.stored.lease):
                self.give_back((report.stored.lease,))
            return False
        if stage is Stage.DENOISER and job.step < job.total_steps:  # its last progress may be lost
            self.progress(report.attempt, job.total_steps, job.total_steps, now)
        runs.end(job.runs, now, seconds=report.seconds)
        self._let_go(job)
        job.stage_seconds[stage.value] = report.seconds
        if stage is Stage.DENOISER and job.total_steps:
            computed = max(1, job.total_steps - job.resumed_from)
            self.step_times.learn(self.requests[job.request_id].step_kind, report.seconds / computed)
        job.advance(DONE[stage], now)
        self.give_back(self.stored_outputs.put(job, stage, report.stored))
        if stage is Stage.ENCODER and self.stored_outputs.cache.capacity and job.model == self.model:
            key = self.prompt_key(job)
            self.give_back(
                self.stored_outputs.offer(key, job.seed, report.stored, seed_independent=report.seed_independent)
            )
        job.advance(next(WAITING[p] for p, upstream in UPSTREAM.items() if upstream is stage), now)
        self._drop_previews(preview for preview in self.previews.of_job(job.id) if not preview.instance)
        self.changed(job)
        return True

    def preview_stored(self, instance: str, report: PreviewStored) -> bool:
        """Keep a stored preview until a decoder has nothing else to do."""
        job = self.jobs.find(denoise_of(report.preview)[0], instance)
        wanted = self.requests[job.request_id].partial_images if job and job.stage is Stage.DENOISER else 0
        if job and self.previews.add(job, wanted, report.preview, report.stored):
            return True
        self.give_back((report.stored.lease,))
        return False

    def finished(self, instance: str, report: StageFinished, now: float) -> bool:
        """Complete a job, or a preview of one, whose artifact is on disk."""
        self.registry.credit(instance, report.issued)
        if preview := self.previews.find(report.attempt, instance):
            self._preview_finished(preview, report)
            return True
        job = self.jobs.find(report.attempt, instance)
        if job is None:
            return False
        runs.end(job.runs, now, seconds=report.seconds)
        job.stage_seconds[report.stage.value] = report.seconds
        job.artifact = report.artifact
        if job.state is not State.DECODER_RUNNING:
            job.advance(State.DECODER_RUNNING, now)
        self._end(job, State.DONE, "", now)
        return True

    def stage_failed(self, instance: str, report: StageFailed, now: float) -> bool:
        """Retry or fail a job whose stage raised."""
        job, known = self._attempt_ended(instance, report)
        if job is None:
            return known
        if report.retryable:
            self._retry(job, f"{instance}: {report.error}", now)
        else:
            job.invalid_request = report.invalid_request
            self.give_up(report.attempt, instance, report.error, now)
        return True

    def returned(self, instance: str, report: StageReturned, now: float) -> bool:
        """Let a job wait again that an instance returned because it ends, or parked."""
        job, known = self._attempt_ended(instance, report)
        if job is None:
            return known
        why = runs.PARKED if job.parking else ExitCause.STOPPED.value
        self._retry(job, f"{instance}: {why}", now, counts=False)
        return True

    def cancelled(self, instance: str, report: StageCancelled) -> bool:
        """Record the credit of an attempt that was cancelled."""
        self._attempt_ended(instance, report)
        return True

    def _attempt_ended(self, instance: str, report: AttemptEnded) -> tuple[Job | None, bool]:
        """Record the credit of an attempt that came to nothing, and forget it if it was a preview.

        Returns:
            The job whose current attempt it was, or None; and whether it was one that counted, of a job or a preview.
        """
        self.registry.credit(instance, report.issued)
        if self._forget_preview(report.attempt):
            return None, True
        job = self.jobs.find(report.attempt, instance)
        return job, job is not None

    def transfer_failed(self, instance: str, report: TransferFailed, now: float) -> bool:
        """Retry a job whose stored tensors could not be fetched."""
        job, known = self._attempt_ended(instance, report)
        if job is None:
            return known
        if report.source_gone:
            self.give_back(self.stored_outputs.drop_spoilt(job))
        job.transfers_lost += 1
        if job.transfers_lost > MAX_TRANSFERS_LOST:
            self.give_up(report.attempt, instance, report.reason, now)
        else:
            self._retry(job, f"{instance}: {report.reason}", now, counts=False)
        return True

    def give_up(self, attempt: Attempt, name: str, reason: str, now: float) -> None:
        """Fail a job that would fail on every instance; forget a preview."""
        self._forget_preview(attempt)
        if job := self.jobs.find(attempt, name):
            job.add_cause(f"{name}: {reason}")
            self._end(job, State.FAILED, reason, now)

    # -- time

    def elapse(self, seconds: float, now: float) -> None:
        """Add `seconds` to all clocks; time out the jobs that exceed a limit of their request or stage."""
        self.jobs.clock.now += seconds
        for job in self.jobs.take_expired():
            bound_s = self.running_timeout_s if job.running else self.waiting_timeout_s
            if job.left_s <= 0:
                request = self.requests[job.request_id]
                given_s = request.times_out_at - request.created_at
                bound = f"[head] request_timeout_s = {given_s:g}"
                reason = f"still {job.state} after {given_s - job.left_s:.3g} s ({bound}){self._trouble(job)}"
            else:
                key = "running_timeout_s" if job.running else "waiting_timeout_s"
                reason = f"{job.state} for {job.stage_s:.3g} s ([head] {key} = {bound_s:g}){self._trouble(job)}"
            self._stop(job, State.TIMED_OUT, reason, now)

    def _trouble(self, job: Job) -> str:
        """Return the problem that the job's instance waits for, as an addition to a sentence."""
        instance = self.registry.instances.get(job.instance)
        return f": {instance.trouble}" if instance and instance.trouble else ""

    def dispatch(self, now: float) -> None:
        """Assign the jobs that can be assigned, and restart what the change to other weights asks for."""
        self._reload_next(now)
        Dispatcher(self).dispatch(now)

    def take_assignments(self) -> list[Effect]:
        """Return the assignments among the effects, which `take_effects` then leaves out."""
        assignments: list[Effect] = [effect for effect in self.effects if isinstance(effect, Assign)]
        if assignments:
            self.effects = [effect for effect in self.effects if not isinstance(effect, Assign)]
        return assignments

    def take_effects(self) -> list[Effect]:
        """Return the effects queued since the last call."""
        effects, self.effects = self.effects, []
        return effects

    def counts(self) -> dict[str, int]:
        """Return the number of active jobs by state."""
        return {state.value: number for state, number in self.jobs.counts.items()}

    def forget(self, request_ids: Iterable[str]) -> None:
        """Remove those of the requests that are terminal."""
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request and request.terminal:
                del self.requests[request_id]
                self.by_key.pop(request.idempotency_key, None)

    # -- changed weights

    def _go_over_to(self, model: str) -> None:
        self.model = model
        self.refused.clear()
        self.stored_outputs.cache.model = model
        self.clear_cache()

    def _reload_next(self, now: float) -> None:
        """Restart jobs whose weights no instance has any more; restart the next instance with old weights."""
        if not self.model:
            return
        instances = self.registry.instances.values()
        for job in self.jobs.with_other_weights(self.model):
            able = (i for i in instances if i.model == job.model and job.stage and i.serves(job.stage))
            if not (job.instance or any(able)):
                self.give_back(self.stored_outputs.drop(job))
                self._retry(job, "the model has changed", now, counts=False)
        if self.reloading and not self.restarting:
            self.reloading = any(i.model != self.model for i in instances)
            if chosen := next_to_restart(instances, self.jobs.values(), self.model):
                self.restarting = chosen.name
                self.registry.drain(chosen.name)
                self.effects.append(RestartInstance(chosen.name))

    # -- inside

    def _preview_finished(self, preview: Preview, report: StageFinished) -> None:
        """Show a preview with its job."""
        self.give_back((self.previews.remove(preview),))
        job = self.jobs[preview.job_id]
        job.previews = sorted([*job.previews, PreviewView(preview.step, report.artifact)], key=lambda view: view.step)
        self.changed(job)

    def _forget_preview(self, attempt: Attempt) -> bool:
        """Forget a preview that came to nothing; return whether it was one."""
        preview = self.previews.get(attempt)
        if preview:
            self.give_back((self.previews.remove(preview),))
        return preview is not None

    def _drop_previews(self, doomed: Iterable[Preview]) -> tuple[LeaseRef, ...]:
        """Forget previews and tell their decoders; return their leases, which are released."""
        leases: list[LeaseRef] = []
        for preview in doomed:
            leases.append(self.previews.remove(preview))
            if preview.instance in self.registry.instances:
                self.effects.append(Cancel(preview.instance, preview.attempt, "the preview is not wanted any more"))
        self.give_back(tuple(leases))
        return tuple(leases)

    def _let_go(self, job: Job) -> None:
        job.instance = ""
        job.step = 0
        job.parking = False

    def _retry(self, job: Job, cause: str, now: float, *, counts: bool = True, fatal: str = "") -> None:
        """Retry the job's stage, or fail the job when it has been tried too often, or for the reason `fatal`."""
        stage = job.stage or Stage.ENCODER
        if job.state is State.DENOISING_RUNNING:
            job.steps_lost_at = max(job.step, job.resumed_from)
        elif stage is Stage.DECODER and job.resume_stage(stage) is not stage:
            job.steps_lost_at = job.total_steps
        runs.end(job.runs, now, reason=cause)
        self._let_go(job)
        job.add_cause(cause)
        job.failures += counts
        if fatal or job.failures >= self.max_attempts or job.deaths >= MAX_DEATHS or job.stalls >= MAX_STALLS:
            self._end(job, State.FAILED, fatal or self._why_given_up(job), now)
            return
        job.attempt += 1
        target = WAITING[job.resume_stage(stage)]
        if job.state is not target:
            job.transition(target, now, cause)
        self.changed(job)

    def _why_given_up(self, job: Job) -> str:
        if job.deaths >= MAX_DEATHS:
            return f"{job.deaths} instances died while they computed it; last: {job.causes[-1]}"
        if job.stalls >= MAX_STALLS:
            return f"{job.stalls} instances fell silent while they computed it; last: {job.causes[-1]}"
        return f"given up after {job.failures} failed attempts; last: {job.causes[-1]}"

    def _stop(self, job: Job, state: State, reason: str, now: float) -> None:
        if job.instance:
            self.effects.append(Cancel(job.instance, job.current_attempt, reason))
        self._end(job, state, reason, now)

    def _end(self, job: Job, state: State, reason: str, now: float) -> None:
        runs.end(job.runs, now, reason=reason)
        self._let_go(job)
        self.give_back(self.stored_outputs.drop(job))
        self._drop_previews(self.previews.of_job(job.id))
        job.transition(state, now, reason)
        self.remove(job)
        self.changed(job)
        request = self.requests[job.request_id]
        if state is State.DONE:
            self.tally.completed += 1
            self.tally.latency_s += now - request.created_at
        if request.terminal:
            request.finished_at = now
            self.effects.append(NotifyWaiters(request.id))
