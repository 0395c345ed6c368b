"""Assign waiting jobs to instances: what is dispatched, parked and reserved. Pure.

The scheduling policy orders the jobs that wait for a stage (`roles.scheduling_policy`), the dispatch policy chooses the
instance (`dispatch.py`), and `preemption.py` which of some denoises gives its place to a more urgent job.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence

from triptych.engines.stages import Stage
from triptych.roles.head import runs
from triptych.roles.head.active_jobs import Bucket, PromptState, Waiting
from triptych.roles.head.dispatch import pools_of
from triptych.roles.head.effects import Assign, AssignPreview, Park
from triptych.roles.head.job import WAITING, Job, State
from triptych.roles.head.preemption import RunningDenoise, least_worth
from triptych.roles.head.scheduling_state import SchedulingState
from triptych.roles.head.stored_outputs import downstream_capacity
from triptych.roles.scheduling_policy import MAX_PASSED_OVER, rank


class Dispatcher:
    """Assigns the waiting jobs of a model.

    Args:
        state: Shared with the scheduler of the model.
    """

    def __init__(self, state: SchedulingState) -> None:
        self._state = state

    def dispatch(self, now: float) -> None:
        """Assign waiting jobs to instances with credits, by the policies; a cached prompt skips the encoder."""
        state = self._state
        if state.policy == "fair":
            state.update_owners()
        state.refile_prompts()
        for stage in Stage:
            while not (stage is Stage.ENCODER and state.paused) and self._dispatch_next(stage, now):
                pass
        while self._park_next():
            pass
        self._dispatch_previews()

    def _dispatch_next(self, stage: Stage, now: float) -> bool:
        """Assign the first job that waits for `stage` and that can go on; return whether there is one."""
        state = self._state
        queue = state.jobs.waiting[stage]
        if not queue or downstream_capacity(stage, state.jobs, state.registry) < 1:
            return False
        closed = self._closed(stage)
        job = self._first(stage, closed)
        if job is None:
            return False
        if stage is Stage.ENCODER and self._skip_encoder(job, now):
            return True
        serial = state.jobs.serial(job)
        self._assign(job, stage, self._choose(job, stage, closed), now)
        if (oldest := queue.oldest) and oldest.serial < serial:  # the one that `overtaken` names
            oldest.job.passed_over += 1
            state.jobs.refile(oldest.job)
        return True

    def _first(self, stage: Stage, closed: Collection[str]) -> Job | None:
        """Return the first of the queue that can go on: that the prompt cache or an instance serves."""
        state = self._state
        free = state.free_instances()
        first: tuple[tuple[float, ...], Job] | None = None
        for bucket, entries in state.jobs.waiting[stage].buckets.items():
            if first and first[0] < _best_rank(bucket):
                continue
            if bucket.prompt is PromptState.IN_PROGRESS:
                continue
            closed_here = () if bucket.suspect else closed
            if bucket.prompt is PromptState.OPEN and not free.any(
                stage, bucket.weights, closed_here, idle=bucket.suspect
            ):
                continue
            job = self._first_of(entries, stage).job
            found = (rank(state.policy, state.facts(job, stage)), job)
            if first is None or found[0] < first[0]:
                first = found
        return first[1] if first else None

    def _first_of(self, entries: Sequence[Waiting], stage: Stage) -> Waiting:
        """Return the first of a bucket: under `deadline`, the first that can still be met."""
        if self._state.policy == "deadline" and len(entries) > 1:
            facts = self._state.facts(entries[0].job, stage)
            if facts.hopeless and facts.passed_over < MAX_PASSED_OVER:
                now, needed_s = self._state.jobs.clock.now, facts.remaining_s or 0.0
                at = bisect_left(entries, needed_s, key=lambda entry: entry.due_at - now)
                return entries[at] if at < len(entries) else entries[0]
        return entries[0]

    def _choose(self, job: Job, stage: Stage, closed: Collection[str]) -> str:
        """Return the instance that gets a job; at least one can take it."""
        state = self._state
        closed = () if job.suspect else closed
        candidates = state.free_instances().contenders(
            stage, state.weights_for(job), pools_of(job), closed, idle=job.suspect
        )
        return state.dispatch_policy.choose(job, state.requests[job.request_id], candidates).name

    def _closed(self, stage: Stage) -> Collection[str]:
        """Return the instances that are kept for suspects: those that have one, and the one reserved for the next.

        The one with the least load is reserved while a suspect waits for the stage. As it gets nothing more, the least
        load only falls, until the suspect has an idle instance. Suspects are rare: only for them, all instances are
        looked at.
        """
        state = self._state
        suspects = state.jobs.suspects.values()
        if not suspects:
            return ()
        closed = {job.instance for job in suspects if job.instance}
        models = {state.weights_for(job) for job in suspects if job.state is WAITING[stage] and not job.instance}
        able = [i for i in state.registry.instances.values() if i.serves(stage) and i.takes_jobs and i.model in models]
        if able:
            closed.add(min(able, key=lambda i: (state.load(i.name), i.last_served, i.name)).name)
        return closed

    # -- parking

    def _park_next(self) -> bool:
        """Tell an instance to park a denoise for a more urgent job; return whether there is one to park."""
        state, stage = self._state, Stage.DENOISER
        queue, denoising = state.jobs.waiting[stage], state.jobs.denoising
        if not (state.preempt and queue and denoising) or queue.highest_priority <= min(denoising):
            return False
        if downstream_capacity(stage, state.jobs, state.registry) < 0:
            return False  # one that is parked gives its place to the other, but there is no place
        closed = self._closed(stage)
        parking = [job for job in state.jobs.parking.values() if job.instance not in closed and self._running(job)]
        served = state.free_instances().credits(stage, state.model, closed) + len(parking)
        # A suspect gets an instance of its own: a place beside others does not serve it.
        urgent = queue.most_urgent_after(served, state.model)
        if urgent is None:
            return False
        taken = {*closed, *(job.instance for job in parking)}
        for priority in sorted(priority for priority in denoising if priority < urgent):
            running = {
                running.facts.serial: (running, job)
                for job in denoising[priority].values()
                if job.instance not in taken and (running := self._running(job))
            }
            if chosen := least_worth([each for each, _ in running.values()]):
                job = running[chosen.facts.serial][1]
                job.parked += 1
                job.parking = True
                state.changed(job)
                state.effects.append(Park(job.instance, job.current_attempt))
                return True
        return False

    def _running(self, job: Job) -> RunningDenoise | None:
        """Describe a denoise of an instance that takes another job in its place; None for all other jobs."""
        state = self._state
        instance = state.registry.instances.get(job.instance)
        if instance is None or job.stage is not Stage.DENOISER or not instance.serves(Stage.DENOISER):
            return None
        if instance.model != state.model or not instance.takes_jobs:
            return None
        return RunningDenoise(
            state.facts(job, Stage.DENOISER),
            instance.name,
            begun=job.running,
            stores_checkpoints=instance.stores_checkpoints,
            parked=job.parked,
            parking=job.parking,
            protected=job.aged,
        )

    # -- previews

    def _dispatch_previews(self) -> None:
        """Assign waiting previews to decoders that have nothing else, while no job waits for one."""
        state = self._state
        if not state.previews or state.jobs.waiting[Stage.DECODER]:
            return
        if not state.free_instances().any_idle(Stage.DECODER):
            return
        for preview in state.previews.waiting():
            job = state.jobs[preview.job_id]
            idle = state.free_instances().contenders(Stage.DECODER, job.model, pools_of(job), idle=True)
            if idle:
                name = state.dispatch_policy.choose(job, state.requests[job.request_id], idle).name
                state.previews.assign(preview, name)
                state.registry.charge(name)
                state.effects.append(AssignPreview(name, preview.attempt))
                if not state.free_instances().any_idle(Stage.DECODER):
                    return

    # -- what is done with a job

    def _assign(self, job: Job, stage: Stage, name: str, now: float) -> None:
        state = self._state
        job.instance = job.instances[stage.value] = name
        runs.assign(job.runs, stage, name, job.attempt, now)
        job.aged = job.passed_over >= MAX_PASSED_OVER
        instance, request = state.registry.instances[name], state.requests[job.request_id]
        if job.model != instance.model:
            state.give_back(state.stored_outputs.drop_checkpoint(job))
        job.model = instance.model
        if not job.bucket and instance.kind != Stage.ENCODER and stage is not Stage.DECODER:
            job.bucket = instance.max_batch
        if state.policy == "fair":
            state.service[stage].add(request.owner, max(1, request.steps))
        state.stored_outputs.cache.misses += stage is Stage.ENCODER and state.stored_outputs.cache.capacity > 0
        state.registry.charge(name)
        state.changed(job)
        state.effects.append(Assign(name, job.id))

    def _skip_encoder(self, job: Job, now: float) -> bool:
        """Skip the encoder if the prompt cache has its outputs; return whether it has."""
        state = self._state
        found = state.stored_outputs.cache.find(state.prompt_key(job), job.seed)
        if found is None:
            return False
        state.stored_outputs.cache.hits += 1
        for kept in (job.instances, job.stage_seconds):
            kept.pop(Stage.ENCODER.value, None)
        state.stored_outputs.put(job, Stage.ENCODER, found)
        job.uses_cached_prompt = True
        job.model = state.model
        job.transition(State.ENCODER_DONE, now, "prompt cache")
        job.advance(State.DENOISING_WAITING, now)
        state.changed(job)
        return True


def _best_rank(bucket: Bucket) -> tuple[float, ...]:
    """Return a rank that none of a bucket is before."""
    return (0,) if bucket.aged else (1, -bucket.priority)
