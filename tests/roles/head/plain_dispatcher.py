"""The plain rule of the dispatcher, to compare the indexed one with: every decision looks at everything."""

from __future__ import annotations

from collections.abc import Collection

from triptych.actors.topology.sections import SchedulingPolicyName
from triptych.engines.stages import Stage
from triptych.roles.head.dispatch import Candidate
from triptych.roles.head.dispatcher import Dispatcher
from triptych.roles.head.effects import AssignPreview, Park
from triptych.roles.head.job import RUNNING, UPSTREAM, WAITING, Job
from triptych.roles.head.preemption import RunningDenoise, least_worth
from triptych.roles.head.stored_outputs import LOOKAHEAD, UNBOUNDED
from triptych.roles.scheduling_policy import SchedulingFacts, overtaken, rank


class PlainDispatcher(Dispatcher):
    """Decides as a dispatcher does, but by the plain rule: looks at all jobs and all instances each time."""

    def dispatch(self, now: float) -> None:
        """Assign waiting jobs to instances with credits, by the policies; a cached prompt skips the encoder."""
        state = self._state
        if state.policy == "fair":
            for service in state.service.values():
                service.update({state.requests[job.request_id].owner for job in state.jobs.values()})
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
        if self._capacity(stage) < 0:
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
        candidates = [each for each in self._candidates(stage) if each.name not in closed]
        free = sum(candidate.credits for candidate in candidates if candidate.model == state.model)
        chosen = _to_park(state.policy, waiting, running, free)
        if chosen is None:
            return False
        job = list(state.jobs.values())[chosen.facts.serial]
        job.parked += 1
        job.parking = True
        state.changed(job)
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
        capacity = self._capacity(stage)
        closed = self._closed(stage)
        candidates = [c for c in self._candidates(stage) if c.name not in closed or not c.load]
        if capacity < 1 or not (candidates or caches):
            return False
        encoding = {state.prompt_key(u) for u in state.jobs.values() if caches and u.instance and u.stage is stage}
        # Without an instance only jobs with a cached prompt go on: do not order hundreds of others at each event.
        queue = self._queue(stage, cached=not candidates)
        for facts, job in queue:
            model = state.weights_for(job)
            able = [c for c in candidates if (not c.load if job.suspect else c.name not in closed)]
            alike = [candidate for candidate in able if candidate.model == model]
            if caches and self._skip_encoder(job, now):
                return True
            if alike and not (caches and self._same_is_made(job, encoding)):
                self._assign(
                    job, stage, state.dispatch_policy.choose(job, state.requests[job.request_id], alike).name, now
                )
                waiting = {f.serial: (f, u) for f, u in queue if self._waits(u, stage)}
                passed = overtaken((f for f, _ in waiting.values()), [facts])
                if passed is not None:
                    waiting[passed][1].passed_over += 1
                    state.changed(waiting[passed][1])
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
        models = {state.weights_for(job) for job in suspects if self._waits(job, stage)}
        able = [i for i in state.registry.instances.values() if i.serves(stage) and i.takes_jobs and i.model in models]
        if able:
            closed.add(min(able, key=lambda i: (self._load(i.name), i.last_served, i.name)).name)
        return closed

    def _dispatch_previews(self) -> None:
        """Assign waiting previews to decoders that have nothing else, while no job waits for one."""
        state = self._state
        waiting = state.previews.waiting()
        if not waiting or any(self._waits(job, Stage.DECODER) for job in state.jobs.values()):
            return
        for preview in waiting:
            job = state.jobs[preview.job_id]
            candidates = self._candidates(Stage.DECODER)
            idle = [candidate for candidate in candidates if not candidate.load and candidate.model == job.model]
            if idle:
                name = state.dispatch_policy.choose(job, state.requests[job.request_id], idle).name
                state.previews.assign(preview, name)
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
        waiting = [
            (self._facts(serial, job, stage), job)
            for serial, job in enumerate(state.jobs.values())  # in the order of arrival
            if self._waits(job, stage)
            and not (cached and not state.stored_outputs.cache.has(state.prompt_key(job), job.seed))
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

    def _load(self, name: str) -> int:
        jobs = sum(job.instance == name for job in self._state.jobs.values())
        return jobs + self._state.previews.load(name)

    def _candidates(self, stage: Stage) -> list[Candidate]:
        return [
            instance.candidate(self._load(instance.name))
            for instance in self._state.registry.instances.values()
            if self._state.registry.takes_jobs(instance) and instance.serves(stage)
        ]

    def _capacity(self, stage: Stage) -> int:
        after = next((p for p, upstream in UPSTREAM.items() if upstream is stage), None)
        instances = self._state.registry.instances.values()
        slots = sum(i.slots for i in instances if after and i.serves(after))
        if after is None or not slots:
            return UNBOUNDED
        under_way = {WAITING[after], RUNNING[after], RUNNING[stage]}
        jobs = self._state.jobs.values()
        ahead = sum(u.state in under_way or (u.stage is stage and bool(u.instance)) for u in jobs)
        here = sum(i.slots for i in instances if i.serves(stage))
        return LOOKAHEAD * slots + (max(slots, here) if stage is Stage.DENOISER else slots) - ahead


def _to_park(
    policy: SchedulingPolicyName, waiting: Collection[SchedulingFacts], running: Collection[RunningDenoise], free: int
) -> RunningDenoise | None:
    """Return the denoise to park next; None if none is.

    It is one of a lower priority than a job that waits and that neither a free credit nor an earlier parking serves.

    Args:
        policy: Orders the waiting jobs.
        waiting: The jobs that wait for their denoise.
        running: The denoises that instances have.
        free: Free credits of instances.
    """
    served = free + sum(each.parking for each in running)
    unserved = sorted(waiting, key=lambda facts: rank(policy, facts))[served:]
    if not unserved:
        return None
    urgent = max(facts.priority for facts in unserved)
    busy = {each.instance for each in running if each.parking}
    return least_worth(each for each in running if each.instance not in busy and each.facts.priority < urgent)
