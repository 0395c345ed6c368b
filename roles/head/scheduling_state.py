"""The requests, jobs and instances of one model, with the settings of the decisions about them. Pure.

`scheduler.py` changes it as events and reports come, `dispatcher.py` as it assigns jobs, `attempt_messages.py` as it
makes the message of an attempt.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from triptych.actors.topology.sections import SchedulingPolicyName
from triptych.engines.stages import Stage
from triptych.roles.head.active_jobs import ActiveJobs, Bucket, PromptState, Ranking
from triptych.roles.head.dispatch import DispatchPolicy
from triptych.roles.head.effects import Effect, ReleaseLeases
from triptych.roles.head.free_instances import FreeInstances
from triptych.roles.head.job import WAITING, Clock, Job, Request
from triptych.roles.head.previews import Previews
from triptych.roles.head.registry import InstanceRegistry
from triptych.roles.head.stored_outputs import StoredOutputs
from triptych.roles.messages.common import Attempt, LeaseRef
from triptych.roles.scheduling_policy import MAX_PASSED_OVER, OwnerService, SchedulingFacts, StepTimes


@dataclass(slots=True)
class CompletionStats:
    """Sums over completed jobs."""

    completed: int = 0
    latency_s: float = 0.0
    """Sum over completed jobs only, so that fast failures do not lower the average."""

    @property
    def average_latency_s(self) -> float:
        """Return the average latency; 0 before the first completion."""
        return self.latency_s / self.completed if self.completed else 0.0


@dataclass(slots=True)
class SchedulingState:
    """What the head knows of one model's jobs and instances."""

    dispatch_policy: DispatchPolicy
    """Chooses the instance of a job."""
    policy: SchedulingPolicyName = "fifo"
    """Chooses the next job of those that wait."""
    max_attempts: int = 3
    waiting_timeout_s: float = 0.0
    """Most seconds that a stage may wait; 0 for no limit."""
    running_timeout_s: float = 0.0
    """Most seconds that a stage may run; 0 for no limit."""
    heartbeat_timeout_s: float = 15.0
    """Most seconds that an instance may be silent."""
    preempt: bool = True
    """Whether running denoises are parked for jobs of a higher priority."""
    requests: dict[str, Request] = field(default_factory=dict)
    by_key: dict[str, Request] = field(default_factory=dict)
    """Requests by idempotency key."""
    jobs: ActiveJobs = field(init=False)
    """Active jobs by id; `changed` is to be called for one that has changed."""
    registry: InstanceRegistry = field(default_factory=InstanceRegistry)
    free: FreeInstances = field(init=False)
    """The instances that would take a job; `free_instances` brings it up to date."""
    stored_outputs: StoredOutputs = field(init=False)
    previews: Previews = field(init=False)
    tally: CompletionStats = field(default_factory=CompletionStats)
    dirty: set[str] = field(default_factory=set)
    """Ids of jobs that changed since the last write of the journal."""
    effects: list[Effect] = field(default_factory=list)
    model: str = ""
    """Version of the weights for new jobs; "" until an instance has registered."""
    refused: dict[str, str] = field(default_factory=dict)
    """Refused instances: the version of their weights by name."""
    reloading: bool = False
    """Whether instances with earlier weights finish their jobs and restart."""
    restarting: str = ""
    """The instance that was told to restart and has not registered again yet."""
    paused: bool = False
    """Whether no job is started because the model sleeps or is to sleep. Started jobs go on."""
    step_times: StepTimes = field(default_factory=StepTimes)
    """Seconds of a denoising step, by the size of what is made."""
    service: dict[Stage, OwnerService] = field(default_factory=lambda: {stage: OwnerService() for stage in Stage})
    """Steps of the jobs that were assigned for each owner, by stage."""
    owners: Counter[str] = field(default_factory=Counter)
    """Number of active jobs of each owner."""
    _known_owners: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.jobs = ActiveJobs(Clock(), self._ranking, self.registry.changed.add, self._limit_s)
        self.free = FreeInstances(self.dispatch_policy)
        self.stored_outputs = StoredOutputs(self.jobs)
        self.previews = Previews(self.registry.changed.add)

    def changed(self, job: Job) -> None:
        """Have a job written to the journal, and found by what it is now."""
        self.dirty.add(job.id)
        self.jobs.refile(job)
        if self.policy == "fair":  # how much a request was served is a rank of all its jobs
            for sibling in self.requests[job.request_id].jobs:
                self.jobs.refile(sibling)

    def add(self, job: Job) -> None:
        """Add an active job of a request that is known."""
        self.jobs.add(job)
        self.stored_outputs.add(job)
        self.owners[self.requests[job.request_id].owner] += 1

    def remove(self, job: Job) -> None:
        """Remove a job that has ended, and for which nothing is stored any more."""
        self.jobs.remove(job)
        self.owners[self.requests[job.request_id].owner] -= 1

    def update_owners(self) -> None:
        """Let `fair` know who has something to do."""
        self.owners += Counter()  # without those that have nothing
        if self.owners.keys() != self._known_owners:
            self._known_owners = set(self.owners)
            for service in self.service.values():
                service.update(self._known_owners)

    def load(self, instance: str) -> int:
        """Return the number of jobs and previews that are assigned to an instance."""
        return self.jobs.load(instance) + self.previews.load(instance)

    def is_current(self, attempt: Attempt, instance: str) -> bool:
        """Return whether the attempt, of a job or a preview, is still assigned to that instance."""
        return self.jobs.find(attempt, instance) is not None or self.previews.find(attempt, instance) is not None

    def free_instances(self) -> FreeInstances:
        """Return the instances that would take a job now."""
        while self.registry.changed:
            name = self.registry.changed.pop()
            instance = self.registry.instances.get(name)
            if instance and instance.stage and self.registry.takes_jobs(instance):
                self.free.file(name, instance.stage, instance.candidate(self.load(name)))
            else:
                self.free.remove(name)
        return self.free

    def refile_prompts(self) -> None:
        """Find the jobs that wait for an encoder by what the prompt cache has now."""
        for key in self.stored_outputs.cache.take_changed():
            self.jobs.refile_prompt(key)

    def facts(self, job: Job, stage: Stage) -> SchedulingFacts:
        """Return what the scheduling policy knows of an active job."""
        request = self.requests[job.request_id]
        return SchedulingFacts(
            self.jobs.serial(job),
            request.priority,
            self.service[stage].of(request.owner),
            _begun(request, stage) if self.policy == "fair" else 0,
            _steps_left(request, job, stage),
            self.step_times.expected(request.step_kind),
            request.due_at(job) - self.jobs.clock.now,
            job.passed_over,
        )

    def weights_for(self, job: Job) -> str:
        """Return the version of the weights that a job needs."""
        return job.model if job.made_with_older_weights(self.model) else self.model

    def _ranking(self, job: Job) -> Ranking:
        """Return what the indexes need to know of a job: its bucket is what its rank and its instance depend on."""
        request = self.requests[job.request_id]
        stage = job.stage
        prompt = self.prompt_key(job) if stage is Stage.ENCODER and self.stored_outputs.cache.capacity else b""
        if stage is None or job.instance or job.state is not WAITING[stage]:
            return Ranking(request.priority, prompt, None)
        served_by = (self._prompt_state(job, prompt), job.suspect, self.weights_for(job))
        if job.passed_over >= MAX_PASSED_OVER:
            return Ranking(request.priority, prompt, Bucket(True, 0, *served_by))
        alike: tuple[object, ...] = ()
        match self.policy:
            case "fair":
                alike = (request.owner, _begun(request, stage))
            case "shortest_remaining" | "deadline":
                alike = (request.step_kind, _steps_left(request, job, stage))
        due_at = request.due_at(job) if self.policy == "deadline" else 0.0
        return Ranking(request.priority, prompt, Bucket(False, request.priority, *served_by, alike), due_at)

    def _prompt_state(self, job: Job, prompt: bytes) -> PromptState:
        cache = self.stored_outputs.cache
        if not prompt:
            return PromptState.OPEN
        if cache.has(prompt, job.seed):
            return PromptState.CACHED
        in_progress = prompt in self.jobs.encoding and cache.can_share(prompt, self.requests[job.request_id].inputs)
        return PromptState.IN_PROGRESS if in_progress else PromptState.OPEN

    def _limit_s(self, job: Job) -> float:
        """Return the most seconds that a job may be in its state; 0 for no limit."""
        return self.running_timeout_s if job.running else self.waiting_timeout_s

    def prompt_key(self, job: Job) -> bytes:
        """Return the key of a job's prompt in the prompt cache."""
        request = self.requests[job.request_id]
        request.prompt_key = request.prompt_key or self.stored_outputs.cache.key(request.inputs)
        return request.prompt_key

    def give_back(self, leases: tuple[LeaseRef, ...]) -> None:
        """Have blocks released."""
        if leases:
            self.effects.append(ReleaseLeases(leases))


def _begun(request: Request, stage: Stage) -> int:
    """Return how many of a request's jobs have begun a stage."""
    return sum(job.has_begun(stage) for job in request.jobs)


def _steps_left(request: Request, job: Job, stage: Stage) -> int | None:
    return 0 if stage is Stage.DECODER else request.steps_left(job)
