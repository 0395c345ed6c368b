"""Assign waiting jobs to instances: what is dispatched, parked and reserved. Pure.

The scheduling policy orders the jobs that wait for a stage (`roles.scheduling_policy`), the dispatch policy chooses the
instance (`dispatch.py`), and `preemption.py` the denoise that gives its place to a more urgent job.
"""

from __future__ import annotations

from triptych.engines.stages import Stage
from triptych.roles.head.effects import Assign, AssignPreview, Park
from triptych.roles.head.job import WAITING, Job, State
from triptych.roles.head.preemption import RunningDenoise, to_park
from triptych.roles.head.scheduling_state import SchedulingState
from triptych.roles.head.stored_outputs import downstream_capacity
from triptych.roles.scheduling_policy import MAX_PASSED_OVER, SchedulingFacts, overtaken, rank


class Dispatcher:
    """Assigns the waiting jobs of a model.

    Args:
        state: Shared with the scheduler of the model.
    """

    def __init__(self, state: SchedulingState) -> None:
        self._state = state

    def dispatch(self, now: float) -> None:
        """Assign waiting jobs to instances with credits, by the policies; a cached prompt skips the encoder."""
        for stage in Stage:
            while not (stage is Stage.ENCODER and self._state.paused) and self._dispatch_next(stage, now):
                pass
        while self._park_next():
            pass
        self._dispatch_previews()

    def _park_next(self) -> bool:
        """Tell an instance to park a denoise for a more urgent job; return whether there is one to park."""
        state = self._state
        if not state.preempt:
            return False
        stage, priority = Stage.DENOISER, {u.id: state.requests[u.request_id].priority for u in state.jobs.values()}
        having = [job for job in state.jobs.values() if job.instance in state.registry.instances and job.stage is stage]
        least = min((priority[job.id] for job in having), default=None)
        if least is None or all(priority[u.id] <= least for u in state.jobs.values() if self._waits(u, stage)):
            return False
        if downstream_capacity(stage, state.jobs.values(), state.registry) < 0:
            return False  # one that is parked gives its place to the other, but there is no place
        queue = self._queue(stage, cached=False)
        # A suspect gets an instance of its own: a place beside others does not serve it.
        waiting = [facts for facts, job in queue if not job.suspect and not job.made_with_older_weights(state.model)]
        closed = self._closed(stage)
        running = [
            running
            for serial, job in enumerate(state.jobs.values())
            if job.instance not in closed and (running := self._running(serial, job))
        ]
        candidates = [each for each in state.registry.candidates(stage, state.load()) if each.name not in closed]
        free = sum(candidate.credits for candidate in candidates if candidate.model == state.model)
        chosen = to_park(state.policy, waiting, running, free)
        if chosen is None:
            return False
        job = list(state.jobs.values())[chosen.facts.serial]
        job.parked += 1
        job.parking = True
        state.dirty.add(job.id)
        state.effects.append(Park(job.instance, job.current_attempt))
        return True

    def _running(self, serial: int, job: Job) -> RunningDenoise | None:
        """Describe a denoise of an instance that takes another job in its place; None for all other jobs."""
        state = self._state
        instance = state.registry.instances.get(job.instance)
        if instance is None or job.stage is not Stage.DENOISER or not instance.serves(Stage.DENOISER):
            return None
        if instance.model != state.model or not instance.takes_jobs:
            return None
        return RunningDenoise(
            self._facts(serial, job, Stage.DENOISER),
            instance.name,
            begun=job.running,
            stores_checkpoints=instance.stores_checkpoints,
            parked=job.parked,
            parking=job.parking,
            protected=job.aged,
        )

    def _dispatch_next(self, stage: Stage, now: float) -> bool:
        """Assign the first job that waits for `stage` and that an instance can take; return whether there is one."""
        state = self._state
        if not any(self._waits(job, stage) for job in state.jobs.values()):
            return False
        caches = stage is Stage.ENCODER and state.stored_outputs.cache.capacity > 0
        capacity = downstream_capacity(stage, state.jobs.values(), state.registry)
        closed = self._closed(stage)
        candidates = [c for c in state.registry.candidates(stage, state.load()) if c.name not in closed or not c.load]
        if capacity < 1 or not (candidates or caches):
            return False
        encoding = {state.prompt_key(u) for u in state.jobs.values() if caches and u.instance and u.stage is stage}
        # Without an instance only jobs with a cached prompt go on: do not order hundreds of others at each event.
        queue = self._queue(stage, cached=not candidates)
        for facts, job in queue:
            if capacity < 1:
                break
            model = self._weights_for(job)
            able = [c for c in candidates if (not c.load if job.suspect else c.name not in closed)]
            alike = [candidate for candidate in able if candidate.model == model]
            if caches and self._skip_encoder(job, now):
                capacity -= 1
            elif alike and not (caches and self._same_is_made(job, encoding)):
                self._assign(job, stage, state.dispatch_policy.choose(job, state.requests[job.request_id], alike).name)
                waiting = {f.serial: (f, u) for f, u in queue if self._waits(u, stage)}
                passed = overtaken((f for f, _ in waiting.values()), [facts])
                if passed is not None:
                    waiting[passed][1].passed_over += 1
                return True
        return False

    def _closed(self, stage: Stage) -> set[str]:
        """Return the instances that are kept for suspects: those that have one, and the one reserved for the next.

        The one with the least load is reserved while a suspect waits for the stage. As it gets nothing more, the least
        load only falls, until the suspect has an idle instance.
        """
        state = self._state
        suspects = [job for job in state.jobs.values() if job.suspect]
        closed = {job.instance for job in suspects if job.instance}
        models = {self._weights_for(job) for job in suspects if self._waits(job, stage)}
        able = [i for i in state.registry.instances.values() if i.serves(stage) and i.takes_jobs and i.model in models]
        if able:
            load = state.load()
            closed.add(min(able, key=lambda i: (load[i.name], i.last_served, i.name)).name)
        return closed

    def _weights_for(self, job: Job) -> str:
        """Return the version of the weights that a job needs."""
        state = self._state
        return job.model if job.made_with_older_weights(state.model) else state.model

    def _dispatch_previews(self) -> None:
        """Assign waiting previews to decoders that have nothing else, while no job waits for one."""
        state = self._state
        waiting = state.previews.waiting()
        if not waiting or any(self._waits(job, Stage.DECODER) for job in state.jobs.values()):
            return
        for preview in waiting:
            job = state.jobs[preview.job_id]
            candidates = state.registry.candidates(Stage.DECODER, state.load())
            idle = [candidate for candidate in candidates if not candidate.load and candidate.model == job.model]
            if idle:
                name = state.dispatch_policy.choose(job, state.requests[job.request_id], idle).name
                preview.instance = name
                state.registry.charge(name)
                state.effects.append(AssignPreview(name, preview.attempt))

    def _waits(self, job: Job, stage: Stage) -> bool:
        return job.state is WAITING[stage] and not job.instance

    def _queue(self, stage: Stage, *, cached: bool) -> list[tuple[SchedulingFacts, Job]]:
        """Return the jobs that wait for an instance of a stage, in the order of the policy.

        Args:
            stage: Any.
            cached: Whether to leave out those whose prompt is not in the cache.
        """
        state = self._state
        if state.policy == "fair":
            state.service[stage].update({state.requests[job.request_id].owner for job in state.jobs.values()})
        waiting = [
            (self._facts(serial, job, stage), job)
            for serial, job in enumerate(state.jobs.values())  # in the order of arrival
            if self._waits(job, stage)
            and not (cached and state.stored_outputs.cache.find(state.prompt_key(job), job.seed) is None)
        ]
        return sorted(waiting, key=lambda entry: rank(state.policy, entry[0]))

    def _facts(self, serial: int, job: Job, stage: Stage) -> SchedulingFacts:
        state = self._state
        request = state.requests[job.request_id]
        due_s = request.deadline_left_s(job)
        return SchedulingFacts(
            serial,
            request.priority,
            state.service[stage].of(request.owner),
            sum(job.has_begun(stage) for job in request.jobs) if state.policy == "fair" else 0,
            0 if stage is Stage.DECODER else request.steps_left(job),
            state.step_times.expected(request.step_kind),
            job.left_s if due_s is None else due_s,
            job.passed_over,
        )

    def _same_is_made(self, job: Job, encoding: set[bytes]) -> bool:
        """Return whether an encoder makes outputs now that this job can share; if not, add its key to `encoding`."""
        state = self._state
        key = state.prompt_key(job)
        waits = key in encoding and state.stored_outputs.cache.can_share(key, state.requests[job.request_id].inputs)
        encoding.add(key)
        return waits

    def _assign(self, job: Job, stage: Stage, name: str) -> None:
        state = self._state
        job.instance = job.instances[stage.value] = name
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
        state.dirty.add(job.id)
        state.effects.append(Assign(name, job.id))

    def _skip_encoder(self, job: Job, now: float) -> bool:
        """Skip the encoder if the cache has its outputs; return whether it did."""
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
        state.dirty.add(job.id)
        return True
