"""The life of one job (one image): its states, the legal transitions between them, and its history.

A request is one or more of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from triptych.actors.topology import ModelIdentity
from triptych.engines.stages import Stage
from triptych.roles.messages.common import Artifact, Attempt, Input, LeaseRef, Output, StoredPayload
from triptych.roles.messages.requests import JobView, RequestView, Transition


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
"""The way of a job that nothing happens to."""

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
"""Whose stored output a stage starts from."""

_ENDS = frozenset({State.FAILED, State.TIMED_OUT, State.CANCELLED})
# What the prompt cache has need not be encoded.
_SHORTCUTS = {State.ENCODER_WAITING: {State.ENCODER_DONE}}
_RETRIES = {
    # A running stage goes back to its own queue, or to an earlier one when the tensors it started from are gone;
    # a waiting one only moves back for the latter reason.
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
"""Every legal transition."""


class IllegalTransitionError(Exception):
    """A transition that the table does not have: a defect of the head, never of a request."""

    def __init__(self, job_id: str, origin: State, target: State) -> None:
        super().__init__(f"{job_id} cannot go from {origin} to {target}")
        self.job_id = job_id
        self.origin = origin
        self.target = target


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """What a stage has made of a job, in a block of a pool."""

    stage: Stage
    """That made it."""
    payload: StoredPayload


@dataclass(slots=True)
class Job:
    """One image or video of a request, on its way through the stages."""

    id: str
    request_id: str
    index: int
    seed: int
    left_s: float = 600.0
    """Seconds until it is TIMED_OUT; counted down, so that no step of a clock reaches it."""
    state: State = State.PENDING
    stage_s: float = 0.0
    """Seconds in its present state."""
    attempt: int = 0
    history: list[Transition] = field(default_factory=list)
    stored: StoredOutput | None = None
    """What it goes on from; only the output of its latest stage is kept. No other record says which block it holds."""
    instance: str = ""
    """The instance that it is assigned to, "" while it waits. No other record says so."""
    instances: dict[str, str] = field(default_factory=dict)
    """The instance that ran each stage last, by stage."""
    stage_seconds: dict[str, float] = field(default_factory=dict)
    causes: list[str] = field(default_factory=list)
    """Why earlier attempts ended, oldest first."""
    failures: int = 0
    """Attempts that ended through the request or its instance; what a transfer, pool or head lost does not count."""
    transfers_lost: int = 0
    """Times that its stored tensors could not be fetched, or were damaged."""
    deaths: int = 0
    """Instances that ended by themselves while they computed this job."""
    stalls: int = 0
    """Instances that fell silent while they computed this job."""
    step: int = 0
    total_steps: int = 0
    artifact: Artifact | None = None
    uses_cached_prompt: bool = False
    """Its encoder output was made for another job of an equal prompt, and has to be adapted to this one."""
    model: str = ""
    """Version of the weights that its tensors at rest were made with; "" before an encoder has had it."""
    invalid_request: bool = False
    """It failed because the pipeline cannot run with its inputs."""

    @property
    def current_attempt(self) -> Attempt:
        """The current attempt."""
        return Attempt(self.id, self.attempt)

    def made_with_older_weights(self, model: str) -> bool:
        """Whether it has been begun with other weights than `model`."""
        return bool(self.model and self.model != model and (self.stored or self.instance))

    @property
    def terminal(self) -> bool:
        """Whether nothing can happen to it any more."""
        return self.state in TERMINAL_STATES

    @property
    def running(self) -> bool:
        """Whether an instance computes it."""
        return self.state in RUNNING.values()

    @property
    def stage(self) -> Stage | None:
        """The stage that it waits for or runs on; None when PENDING, between stages, or terminal."""
        return STAGE_OF.get(self.state)

    def transition(self, target: State, at: float, reason: str = "") -> None:
        """Go to `target` at `at` (unix seconds).

        Raises:
            IllegalTransitionError: when the table has no such transition; the job stays as it was.
        """
        if target not in LEGAL_TRANSITIONS[self.state]:
            raise IllegalTransitionError(self.id, self.state, target)
        self.state = target
        self.stage_s = 0.0
        self.history.append(Transition(target.value, at, reason))

    def advance(self, target: State, at: float) -> None:
        """Advance along the happy path up to and including `target`; nothing when it is already there.

        Raises:
            IllegalTransitionError: when `target` does not lie ahead.
        """
        if self.terminal or target not in HAPPY_PATH or HAPPY_PATH.index(target) < HAPPY_PATH.index(self.state):
            raise IllegalTransitionError(self.id, self.state, target)
        for state in HAPPY_PATH[HAPPY_PATH.index(self.state) + 1 : HAPPY_PATH.index(target) + 1]:
            self.transition(state, at)

    def resume_stage(self, stage: Stage) -> Stage:
        """The stage to start again from when `stage` was lost: the nearest whose inputs are still at rest."""
        while stage in UPSTREAM and not (self.stored and self.stored.stage is UPSTREAM[stage]):
            stage = UPSTREAM[stage]
        return stage

    @property
    def lease(self) -> LeaseRef | None:
        """The block of its stored output."""
        return self.stored.payload.lease if self.stored else None

    def forget_stored(self) -> None:
        """Start from nothing any more."""
        self.stored = None
        self.uses_cached_prompt = False

    def view(self) -> JobView:
        """What a client may know."""
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
        )


@dataclass(slots=True)
class Request:
    """What a client asked for: one or more jobs."""

    id: str
    inputs: dict[str, Input]
    output: Output
    created_at: float
    deadline: float
    """Unix seconds, as of its acceptance; what counts is what its jobs have left."""
    jobs: list[Job]
    idempotency_key: str = ""
    digest: str = ""
    """Of the body, to tell a retry from another request under the same key."""
    finished_at: float = 0.0
    owner: str = ""
    """Name of the API key that it came with; "" without keys."""
    served: ModelIdentity | None = None
    """The model that it was accepted for; None where an earlier version did not note it."""
    model: str = ""
    """The model that serves it, by its name in the topology; "" for one that has none there."""
    prompt_key: bytes = b""
    """Of the prompt cache; made when it is first asked for."""

    @property
    def terminal(self) -> bool:
        """Whether every job is."""
        return all(job.terminal for job in self.jobs)

    @property
    def state(self) -> State:
        """Of the job furthest behind; once all are terminal, the worst outcome."""
        if not self.terminal:
            return min((u.state for u in self.jobs if not u.terminal), key=HAPPY_PATH.index)
        worst_first = (State.FAILED, State.TIMED_OUT, State.CANCELLED, State.DONE)
        return min((u.state for u in self.jobs), key=worst_first.index)

    def view(self, model: str = "") -> RequestView:
        """What a client may know, who calls its model `model`."""
        return RequestView(
            request_id=self.id,
            model=model,
            state=self.state.value,
            terminal=self.terminal,
            created_at=self.created_at,
            finished_at=self.finished_at,
            inputs=self.inputs,
            output=self.output,
            units=tuple(job.view() for job in self.jobs),
        )
