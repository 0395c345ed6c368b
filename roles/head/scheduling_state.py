"""The requests, jobs and instances of one model, with the settings of the decisions about them. Pure.

`scheduler.py` changes it as events and reports come, `dispatcher.py` as it assigns jobs.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from triptych.actors.topology.sections import SchedulingPolicyName
from triptych.engines.stages import Stage
from triptych.roles.head.dispatch import DispatchPolicy
from triptych.roles.head.effects import Effect, ReleaseLeases
from triptych.roles.head.job import Job, Request
from triptych.roles.head.previews import Previews
from triptych.roles.head.registry import InstanceRegistry
from triptych.roles.head.stored_outputs import StoredOutputs
from triptych.roles.messages.common import LeaseRef
from triptych.roles.scheduling_policy import OwnerService, StepTimes


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
    max_pending: int = 256
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
    jobs: dict[str, Job] = field(default_factory=dict)
    """Active jobs by id."""
    registry: InstanceRegistry = field(default_factory=InstanceRegistry)
    stored_outputs: StoredOutputs = field(init=False)
    previews: Previews = field(default_factory=Previews)
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

    def __post_init__(self) -> None:
        self.stored_outputs = StoredOutputs(self.jobs)

    def load(self) -> Counter[str]:
        """Return the number of jobs and previews that are assigned to each instance, by name."""
        return Counter(job.instance for job in self.jobs.values() if job.instance) + self.previews.load()

    def prompt_key(self, job: Job) -> bytes:
        """Return the key of a job's prompt in the prompt cache."""
        request = self.requests[job.request_id]
        request.prompt_key = request.prompt_key or self.stored_outputs.cache.key(request.inputs)
        return request.prompt_key

    def give_back(self, leases: tuple[LeaseRef, ...]) -> None:
        """Have blocks released."""
        if leases:
            self.effects.append(ReleaseLeases(leases))
