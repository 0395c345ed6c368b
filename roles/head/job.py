"""One job (one image or video): its states, the legal transitions between them, and its history.

A request has one or more jobs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise
from typing import Final

from triptych.actors.topology import ModelIdentity
from triptych.engines.stages import Stage
from triptych.roles.messages.common import Artifact, Attempt, Input, LeaseRef, Output, StoredPayload
from triptych.roles.messages.requests import JobView, PreviewView, RequestView, RunView, Transition


class State(StrEnum):
    """Where a job is."""

    PENDING = "PENDING"
    ENCODER_WAITING = "ENCODER_WAITING"
    ENCODER_RUNNING = "ENCODER_RUNNING"
    ENCODER_DONE = "ENCODER_DONE"
    DENOISING_WAITING = "DENOISING_WAITING"
    DENOISING_RUNNING = "DENOISING_RUNNING"
    DENOISING_DONE = "DENOISING_DONE"
    DECODER_WAITING = "DECODER_WAITING"
    DECODER_RUNNING = "DECODER_RUNNING"
    DONE = "DONE"
    FAILED = "FAILED"
    TIMED_OUT = "TIMED_OUT"
    CANCELLED = "CANCELLED"


HAPPY_PATH: tuple[State, ...] = (
    State.PENDING,
    State.ENCODER_WAITING,
    State.ENCODER_RUNNING,
    State.ENCODER_DONE,
    State.DENOISING_WAITING,
    State.DENOISING_RUNNING,
    State.DENOISING_DONE,
    State.DECODER_WAITING,
    State.DECODER_RUNNING,
    State.DONE,
)
"""The states of a job without retries or failures."""

TERMINAL_STATES = frozenset({State.DONE, State.FAILED, State.TIMED_OUT, State.CANCELLED})

WAITING = {
    Stage.ENCODER: State.ENCODER_WAITING,
    Stage.DENOISER: State.DENOISING_WAITING,
    Stage.DECODER: State.DECODER_WAITING,
}
RUNNING = {
    Stage.ENCODER: State.ENCODER_RUNNING,
    Stage.DENOISER: State.DENOISING_RUNNING,
    Stage.DECODER: State.DECODER_RUNNING,
}
DONE = {
    Stage.ENCODER: State.ENCODER_DONE,
    Stage.DENOISER: State.DENOISING_DONE,
    Stage.DECODER: State.DONE,
}
STAGE_OF = {state: stage for states in (WAITING, RUNNING) for stage, state in states.items()}
UPSTREAM = {Stage.DENOISER: Stage.ENCODER, Stage.DECODER: Stage.DENOISER}
"""The stage whose stored output a stage starts from."""

SUSPECT_AFTER = 2
"""A job that was running this often when its instance crashed with others on it is a suspect. Once says little: kills
from outside are common, and any of the others may be the cause."""

MAX_MOVES: Final = 256
"""Most transitions of a job that are kept, the first and the last ones: one that is lost again and again has more."""
MAX_CAUSES: Final = 64
"""Most causes of a job that are kept, the first and the last ones: a refusal that does not count adds one too."""

_ENDS = frozenset({State.FAILED, State.TIMED_OUT, State.CANCELLED})
# A cached prompt skips the encoder.
_SHORTCUTS = {State.ENCODER_WAITING: {State.ENCODER_DONE}}
_RETRIES = {
    # A running stage goes back to its own queue, or to an earlier one if its input tensors are lost; a waiting one only
    # moves back for the latter reason.
    State.ENCODER_RUNNING: {State.ENCODER_WAITING},
    State.DENOISING_WAITING: {State.ENCODER_WAITING},
    State.DENOISING_RUNNING: {State.DENOISING_WAITING, State.ENCODER_WAITING},
    State.DECODER_WAITING: {State.DENOISING_WAITING, State.ENCODER_WAITING},
    State.DECODER_RUNNING: {State.DECODER_WAITING, State.DENOISING_WAITING, State.ENCODER_WAITING},
}
LEGAL_TRANSITIONS: dict[State, frozenset[State]] = {
    state: frozenset({following} | _ENDS | _SHORTCUTS.get(state, set()) | _RETRIES.get(state, set()))
    for state, following in pairwise(HAPPY_PATH)
} | {state: frozenset() for state in TERMINAL_STATES}
"""The legal next states of each state."""


class IllegalTransitionError(Exception):
    """A transition that is not in LEGAL_TRANSITIONS: a defect of the head, never of a request."""

    def __init__(self, job_id: str, origin: State, target: State) -> None:
        super().__init__(f"{job_id} cannot go from {origin} to {target}")
        self.job_id = job_id
        self.origin = origin
        self.target = target


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """The output of a stage for a job, in a block of a pool."""

    stage: Stage
    """The stage that made it."""
    payload: StoredPayload


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a denoise has made so far, in a block of a pool."""

    step: int
    """Steps that are done in it."""
    payload: StoredPayload


@dataclass(slots=True, eq=False)
class Clock:
    """Seconds that a scheduler has counted, so that changes of the system clock do not affect its jobs."""

    now: float = 0.0


STOPPED: Final = Clock()
"""The clock of jobs that no scheduler has."""


@dataclass(slots=True)
class Job:
    """One image or video of a request, on its way through the stages."""

    id: str
    request_id: str
    index: int
    seed: int
    expires_at: float = 600.0
    """When it is TIMED_OUT, on its clock."""
    state: State = State.PENDING
    entered_at: float = 0.0
    """When it came into its present state, on its clock."""
    clock: Clock = field(default=STOPPED, repr=False, compare=False)
    attempt: int = 0
    history: list[Transition] = field(default_factory=list)
    moves_left_out: int = 0
    """Transitions between those of `history`, which are not kept."""
    stored: StoredOutput | None = None
    """The input of its next stage; only the output of the latest stage is kept. The one record of its block."""
    checkpoint: Checkpoint | None = None
    """The newest of its denoise, beside the encoder's output. The one record of its block."""
    resumed_from: int = 0
    """Step of the checkpoint that its present or last denoise went on from; 0 if it began at the beginning."""
    steps_lost_at: int = 0
    """Steps that were done when its denoise last lost its instance or its output; those that it began with, since."""
    steps_redone: int = 0
    """Steps that were computed again because an instance was lost."""
    instance: str = ""
    """The instance that it is assigned to, "" while it waits. The one record of this."""
    instances: dict[str, str] = field(default_factory=dict)
    """The last instance of each stage, by stage."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    causes: list[str] = field(default_factory=list)
    """Why earlier attempts ended, oldest first; `add_cause` adds one."""
    failures: int = 0
    """Attempts that the request or its instance ended; losses of a transfer, pool or head do not count."""
    transfers_lost: int = 0
    """Times that its stored tensors could not be fetched, or were damaged."""
    deaths: int = 0
    """Instances that crashed while they computed this job alone."""
    shared_deaths: int = 0
    """Instances that crashed while they computed this job and others, each of which may be the cause."""
    stalls: int = 0
    """Instances that fell silent while they computed this job."""
    parked: int = 0
    """How often its instance was told to park it for a more urgent job."""
    parking: bool = False
    """Whether this head has told its instance to park it, which has it still."""
    aged: bool = False
    """Whether the aging rule chose it for its present stage: it is not parked any more."""
    step: int = 0
    total_steps: int = 0
    passed_over: int = 0
    """How often younger jobs were assigned before it in its present stage; see `roles.scheduling_policy`."""
    bucket: int = 0
    """Rows of each batch that its denoise is computed in; 0 until an instance has it for its denoise. It then stays
    the same, because the bits of the result depend on it."""
    artifact: Artifact | None = None
    previews: list[PreviewView] = field(default_factory=list)
    """Its partial images so far, by step."""
    uses_cached_prompt: bool = False
    """Whether its encoder output was made for another job of an equal prompt, and must be adapted to this one."""
    runs: list[RunView] = field(default_factory=list)
    """Every try of an instance at one of its stages: see `roles.head.runs`."""
    model: str = ""
    """Version of the weights that its stored tensors were made with; "" before the first encode."""
    invalid_request: bool = False
    """Whether it failed because the pipeline cannot run with its inputs."""

    @property
    def left_s(self) -> float:
        """Return the seconds until it is TIMED_OUT."""
        return self.expires_at - self.clock.now

    @property
    def stage_s(self) -> float:
        """Return the seconds in its present state."""
        return self.clock.now - self.entered_at

    def set_clock(self, clock: Clock) -> None:
        """Go on by another clock, with the same time left."""
        difference = clock.now - self.clock.now
        self.expires_at += difference
        self.entered_at += difference
        self.clock = clock

    @property
    def current_attempt(self) -> Attempt:
        """Return the current attempt."""
        return Attempt(self.id, self.attempt)

    def made_with_older_weights(self, model: str) -> bool:
        """Return whether it was started with other weights than `model`."""
        return bool(self.model and self.model != model and (self.stored or self.instance))

    @property
    def moves(self) -> int:
        """Return the number of its transitions."""
        return len(self.history) + self.moves_left_out

    @property
    def terminal(self) -> bool:
        """Return whether its state is final."""
        return self.state in TERMINAL_STATES

    @property
    def running(self) -> bool:
        """Return whether an instance computes it."""
        return self.state in RUNNING.values()

    @property
    def suspect(self) -> bool:
        """Return whether it may be what crashes its instances, so that it is computed alone."""
        return self.shared_deaths >= SUSPECT_AFTER

    def has_begun(self, stage: Stage) -> bool:
        """Return whether `stage` is assigned, or done."""
        if self.terminal:
            return True
        waits_for = HAPPY_PATH.index(WAITING[stage])
        return HAPPY_PATH.index(self.state) + bool(self.instance) > waits_for

    @property
    def stage(self) -> Stage | None:
        """Return the stage that it waits for or runs; None when PENDING, between stages, or terminal."""
        return STAGE_OF.get(self.state)

    def transition(self, target: State, at: float, reason: str = "") -> None:
        """Change the state to `target` at `at` (unix seconds).

        Raises:
            IllegalTransitionError: The transition is not legal; the job is unchanged.
        """
        if target not in LEGAL_TRANSITIONS[self.state]:
            raise IllegalTransitionError(self.id, self.state, target)
        self.state = target
        self.entered_at = self.clock.now
        self.passed_over = 0
        self.history.append(Transition(target.value, at, reason))
        self.moves_left_out += _shorten(self.history, MAX_MOVES)

    def advance(self, target: State, at: float) -> None:
        """Advance along the happy path up to and including `target`; no-op when already there.

        Raises:
            IllegalTransitionError: `target` does not lie ahead.
        """
        if self.terminal or target not in HAPPY_PATH or HAPPY_PATH.index(target) < HAPPY_PATH.index(self.state):
            raise IllegalTransitionError(self.id, self.state, target)
        for state in HAPPY_PATH[HAPPY_PATH.index(self.state) + 1 : HAPPY_PATH.index(target) + 1]:
            self.transition(state, at)

    def begin(self, at: float) -> None:
        """Let a pending job wait for its first stage."""
        self.attempt = 1
        self.advance(State.ENCODER_WAITING, at)

    def resume_stage(self, stage: Stage) -> Stage:
        """Return the stage to restart from when `stage` was lost: the latest one whose inputs are still stored."""
        while stage in UPSTREAM and not (self.stored and self.stored.stage is UPSTREAM[stage]):
            stage = UPSTREAM[stage]
        return stage

    @property
    def lease(self) -> LeaseRef | None:
        """Return the block of its stored output, or None."""
        return self.stored.payload.lease if self.stored else None

    @property
    def leases(self) -> tuple[LeaseRef, ...]:
        """Return the blocks of its stored output and of its checkpoint."""
        checkpoint = (self.checkpoint.payload.lease,) if self.checkpoint else ()
        return (*((self.lease,) if self.lease else ()), *checkpoint)

    def add_cause(self, cause: str) -> None:
        """Record why an attempt has ended."""
        self.causes.append(cause)
        _shorten(self.causes, MAX_CAUSES)

    def forget_stored(self) -> None:
        """Forget the stored output."""
        self.stored = None
        self.uses_cached_prompt = False

    def view(self, *, brief: bool = False) -> JobView:
        """Return what clients may see; a `brief` view leaves its runs out."""
        return JobView(
            index=self.index,
            seed=self.seed,
            state=self.state.value,
            attempts=self.attempt,
            step=self.step,
            total_steps=self.total_steps,
            history=tuple(self.history),
            instances=dict(self.instances),
            stage_seconds=dict(self.stage_seconds),
            causes=tuple(self.causes),
            artifact=self.artifact,
            at_fault=self.invalid_request,
            bucket=self.bucket,
            previews=tuple(self.previews),
            checkpoint_step=self.checkpoint.step if self.checkpoint else 0,
            resumed_from=self.resumed_from,
            steps_redone=self.steps_redone,
            parked=self.parked,
            runs=() if brief else tuple(self.runs),
        )


def _shorten(kept: list[Transition] | list[str], most: int) -> int:
    """Remove what is too much from the middle of a list; return how many that were."""
    surplus = max(0, len(kept) - most)
    del kept[most // 2 : most // 2 + surplus]
    return surplus


@dataclass(slots=True)
class Request:
    """What a client asked for: one or more jobs."""

    id: str
    inputs: dict[str, Input]
    output: Output
    created_at: float
    times_out_at: float
    """Unix seconds, set at acceptance; `Job.expires_at` is what is enforced."""
    jobs: list[Job]
    idempotency_key: str = ""
    digest: str = ""
    """Digest of the body, to tell a retry from another request under the same key."""
    finished_at: float = 0.0
    owner: str = ""
    """Name of the client's API key; "" without keys."""
    served: ModelIdentity | None = None
    """The model that it was accepted for; None if accepted by a version that did not record it."""
    model: str = ""
    """The model that serves it, by its name in the topology; "" for one without a name."""
    priority: int = 0
    """A higher one goes first."""
    deadline_s: float = 0.0
    """Seconds from acceptance in which the client wants the result; 0 without a deadline. It orders jobs, ends none."""
    steps: int = 0
    """Denoising steps of each job; 0 if unknown."""
    partial_images: int = 0
    """Most previews of each job."""
    remixed_from: str = ""
    """Id of the request whose inputs it has, with another prompt; "" for none."""
    webhook_url: str = ""
    """Called once it has ended; "" for none."""
    prompt_key: bytes = b""
    """Key of the prompt cache; computed at first use."""

    def due_at(self, job: Job) -> float:
        """Return when one of its jobs is due, on the clock of the job: at the deadline, without one at the timeout."""
        timeout_s = self.times_out_at - self.created_at
        return job.expires_at - timeout_s + self.deadline_s if self.deadline_s else job.expires_at

    def deadline_left_s(self, job: Job) -> float | None:
        """Return the seconds until the deadline, below 0 after it, as counted for one of its jobs; None without one."""
        return self.due_at(job) - job.clock.now if self.deadline_s else None

    def steps_left(self, job: Job) -> int | None:
        """Return the denoising steps that one of its jobs still needs; None if unknown."""
        steps = job.total_steps or self.steps
        return steps - max(job.step, job.checkpoint.step if job.checkpoint else 0) if steps else None

    @property
    def step_kind(self) -> tuple[object, ...]:
        """Return what the time of a step depends on."""
        return self.inputs.get("height"), self.inputs.get("width"), self.inputs.get("num_frames")

    @property
    def deadline_met(self) -> bool | None:
        """Return whether it was done by its deadline; None without one, or while that is open."""
        if not self.deadline_s or not self.terminal:
            return None
        return self.state is State.DONE and self.finished_at - self.created_at <= self.deadline_s

    @property
    def terminal(self) -> bool:
        """Return whether every job is terminal."""
        return all(job.terminal for job in self.jobs)

    @property
    def state(self) -> State:
        """Return the state of the least advanced job; once all are terminal, the worst outcome."""
        if not self.terminal:
            return min((u.state for u in self.jobs if not u.terminal), key=HAPPY_PATH.index)
        worst_first = (State.FAILED, State.TIMED_OUT, State.CANCELLED, State.DONE)
        return min((u.state for u in self.jobs), key=worst_first.index)

    @property
    def revision(self) -> str:
        """Return what changes with each move, step and preview: `MOVES.STEP.PREVIEWS` of each job, with "-" between."""
        return "-".join(f"{job.moves}.{job.step}.{len(job.previews)}" for job in self.jobs)

    def view(self, model: str = "", *, brief: bool = False) -> RequestView:
        """Return what clients may see.

        Args:
            model: The name of its model for them.
            brief: Whether to leave out inputs and runs, the largest parts, while it is active.
        """
        brief = brief and not self.terminal
        return RequestView(
            request_id=self.id,
            model=model,
            state=self.state.value,
            terminal=self.terminal,
            created_at=self.created_at,
            finished_at=self.finished_at,
            inputs={} if brief else self.inputs,
            output=self.output,
            units=tuple(job.view(brief=brief) for job in self.jobs),
            priority=self.priority,
            deadline_s=self.deadline_s or None,
            deadline_met=self.deadline_met,
            revision=self.revision,
            remixed_from=self.remixed_from,
            webhook_url=self.webhook_url,
        )
