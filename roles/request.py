"""The life of one unit of work (one picture): its states, the legal moves between them, and its history.

A request is one or more of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from triptych.actors.ownership import ModelIdentity
from triptych.engines.panels import Panel
from triptych.roles.messages.requests import Move, RequestView, UnitView
from triptych.roles.messages.work import Artifact, Input, LeaseRef, Output, Staged, Work


class State(StrEnum):
    """Where a unit of work is."""

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


JOURNEY: tuple[State, ...] = (
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
"""The way of a unit that nothing happens to."""

TERMINAL = frozenset({State.DONE, State.FAILED, State.TIMED_OUT, State.CANCELLED})

WAITING = {
    Panel.ENCODER: State.ENCODER_WAITING,
    Panel.DENOISER: State.DENOISING_WAITING,
    Panel.DECODER: State.DECODER_WAITING,
}
RUNNING = {
    Panel.ENCODER: State.ENCODER_RUNNING,
    Panel.DENOISER: State.DENOISING_RUNNING,
    Panel.DECODER: State.DECODER_RUNNING,
}
DONE = {
    Panel.ENCODER: State.ENCODER_DONE,
    Panel.DENOISER: State.DENOISING_DONE,
    Panel.DECODER: State.DONE,
}
PANEL_OF = {state: panel for states in (WAITING, RUNNING) for panel, state in states.items()}
UPSTREAM = {Panel.DENOISER: Panel.ENCODER, Panel.DECODER: Panel.DENOISER}
"""Whose staged output a panel starts from."""

_ABORTS = frozenset({State.FAILED, State.TIMED_OUT, State.CANCELLED})
# What the prompt cache has need not be encoded.
_SHORTCUTS = {State.ENCODER_WAITING: {State.ENCODER_DONE}}
_RETREATS = {
    # A running stage goes back to its own queue, or to an earlier one when the tensors it started from are gone;
    # a waiting one only moves back for the latter reason.
    State.ENCODER_RUNNING: {State.ENCODER_WAITING},
    State.DENOISING_WAITING: {State.ENCODER_WAITING},
    State.DENOISING_RUNNING: {State.DENOISING_WAITING, State.ENCODER_WAITING},
    State.DECODER_WAITING: {State.DENOISING_WAITING, State.ENCODER_WAITING},
    State.DECODER_RUNNING: {State.DECODER_WAITING, State.DENOISING_WAITING, State.ENCODER_WAITING},
}
LEGAL: dict[State, frozenset[State]] = {
    state: frozenset({following} | _ABORTS | _SHORTCUTS.get(state, set()) | _RETREATS.get(state, set()))
    for state, following in pairwise(JOURNEY)
} | {state: frozenset() for state in TERMINAL}
"""Every legal move."""


class IllegalTransitionError(Exception):
    """A move that the table does not have: a defect of the head, never of a request."""

    def __init__(self, unit_id: str, origin: State, target: State) -> None:
        super().__init__(f"{unit_id} cannot go from {origin} to {target}")
        self.unit_id = unit_id
        self.origin = origin
        self.target = target


@dataclass(slots=True)
class Unit:
    """One picture on its way."""

    id: str
    request_id: str
    index: int
    seed: int
    left_s: float = 600.0
    """Seconds until it is TIMED_OUT; counted down, so that no step of a clock reaches it. An earlier version did not
    write it: then it has this much."""
    state: State = State.PENDING
    stage_s: float = 0.0
    """Seconds in its present state."""
    attempt: int = 0
    history: list[Move] = field(default_factory=list)
    staged: dict[Panel, Staged] = field(default_factory=dict)
    """Outputs at rest, by the panel that made them."""
    instance: str = ""
    """Who has it in hand, empty while it waits."""
    instances: dict[str, str] = field(default_factory=dict)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    causes: list[str] = field(default_factory=list)
    failures: int = 0
    """Attempts that ended through the request or its instance; what a transfer, pool or head lost does not count."""
    transfers_lost: int = 0
    """Times that its staged tensors could not be fetched, or were damaged."""
    deaths: int = 0
    """Instances that ended by themselves while they computed this unit."""
    stalls: int = 0
    """Instances that fell silent while they computed this unit."""
    step: int = 0
    total_steps: int = 0
    artifact: Artifact | None = None
    borrows: bool = False
    """What it has of an encoder was made for another unit of an equal prompt, and has to be made its own."""
    model: str = ""
    """Version of the weights that its tensors at rest were made with; "" before an encoder has had it."""
    at_fault: bool = False
    """It failed because the pipeline cannot run with its inputs."""

    @property
    def work(self) -> Work:
        """The current attempt."""
        return Work(self.id, self.attempt)

    def made_of_old(self, model: str) -> bool:
        """Whether it has been begun with other weights than `model`."""
        return bool(self.model and self.model != model and (self.staged or self.instance))

    @property
    def terminal(self) -> bool:
        """Whether nothing can happen to it any more."""
        return self.state in TERMINAL

    @property
    def running(self) -> bool:
        """Whether an instance computes it."""
        return self.state in RUNNING.values()

    @property
    def panel(self) -> Panel | None:
        """The panel that it waits for or runs on; None when PENDING, between panels, or terminal."""
        return PANEL_OF.get(self.state)

    def move(self, target: State, at: float, reason: str = "") -> None:
        """Go to `target` at `at` (unix seconds).

        Raises:
            IllegalTransitionError: when the table has no such move; the unit stays as it was.
        """
        if target not in LEGAL[self.state]:
            raise IllegalTransitionError(self.id, self.state, target)
        self.state = target
        self.stage_s = 0.0
        self.history.append(Move(target.value, at, reason))

    def advance(self, target: State, at: float) -> None:
        """Walk the journey forward up to and including `target`; nothing when it is already there.

        Raises:
            IllegalTransitionError: when `target` does not lie ahead.
        """
        if self.terminal or target not in JOURNEY or JOURNEY.index(target) < JOURNEY.index(self.state):
            raise IllegalTransitionError(self.id, self.state, target)
        for state in JOURNEY[JOURNEY.index(self.state) + 1 : JOURNEY.index(target) + 1]:
            self.move(state, at)

    def resume_panel(self, panel: Panel) -> Panel:
        """The panel to start again from when `panel` was lost: the nearest whose inputs are still at rest."""
        while panel in UPSTREAM and UPSTREAM[panel] not in self.staged:
            panel = UPSTREAM[panel]
        return panel

    def drop_staged(self) -> tuple[LeaseRef, ...]:
        """Forget every staged output; returns their leases."""
        leases = tuple(staged.lease for staged in self.staged.values())
        self.forget_staged(tuple(self.staged))
        return leases

    def forget_staged(self, panels: Iterable[Panel]) -> None:
        """Forget the outputs of some panels."""
        for panel in panels:
            del self.staged[panel]
        self.borrows = self.borrows and Panel.ENCODER in self.staged

    def view(self) -> UnitView:
        """What a client may know."""
        return UnitView(
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
            at_fault=self.at_fault,
        )


@dataclass(slots=True)
class Request:
    """What a client asked for: one or more units."""

    id: str
    inputs: dict[str, Input]
    output: Output
    created_at: float
    deadline: float
    """Unix seconds, as of its acceptance; what counts is what its units have left."""
    units: list[Unit]
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
        """Whether every unit is."""
        return all(unit.terminal for unit in self.units)

    @property
    def state(self) -> State:
        """Of the unit furthest behind; once all are terminal, the worst outcome."""
        if not self.terminal:
            return min((u.state for u in self.units if not u.terminal), key=JOURNEY.index)
        worst_first = (State.FAILED, State.TIMED_OUT, State.CANCELLED, State.DONE)
        return min((u.state for u in self.units), key=worst_first.index)

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
            units=tuple(unit.view() for unit in self.units),
        )
