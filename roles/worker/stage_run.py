"""The state of the runs on a device: a run is one stage of an attempt, a round the step that some of them took.

The head's record of a run (`roles.head.runs`) begins before, when it assigns the job.
"""

from __future__ import annotations

from dataclasses import dataclass

from triptych.engines.memory.streams import StreamEvent
from triptych.engines.stages import Stage
from triptych.engines.steps.denoising import Denoising
from triptych.roles.messages.common import Attempt
from triptych.roles.worker.attempts import ActiveAttempt


class RunLeftError(Exception):
    """Files are read for a run that has ended."""


@dataclass(slots=True, eq=False)
class StageRun:
    """One stage of an attempt, from its place among the waiting runs to its outputs."""

    item: ActiveAttempt
    stage: Stage
    began: float | None = None
    """When its first round began, in seconds of a monotonic clock; None while it waits."""
    denoising: Denoising | None = None
    """Set once a denoise is prepared."""
    inputs: dict[str, object] | None = None
    """What an encode computes with, if files had to be read for it."""
    unreadable: Exception | None = None
    """Why those files could not be read."""
    outputs: dict[str, object] | None = None
    """What an encode or a decode has made."""
    saved_at: float = 0.0
    """When its last snapshot was taken, or it began; in seconds of a monotonic clock."""
    resumes: bool = False
    """Whether it goes on from a checkpoint, whose steps its next round skips."""
    seed_independent: bool = False
    """Whether the outputs of an encode are the same for every seed."""
    left: bool = False
    """Whether it has ended or was stopped, so that nobody needs its files any more."""

    @property
    def attempt(self) -> Attempt:
        """Return its attempt."""
        return self.item.attempt

    def check(self) -> None:
        """Raise RunLeftError if nobody waits for it any more; any thread may ask."""
        if self.left:
            raise RunLeftError(str(self.attempt))

    def result(self) -> dict[str, object]:
        """Return its outputs; raises RuntimeError unless it has ended."""
        if self.denoising is not None:
            return self.denoising.result()
        if self.outputs is None:
            raise RuntimeError(f"the {self.stage} of {self.attempt} has no outputs")
        return self.outputs


@dataclass(frozen=True, slots=True)
class RunStep:
    """What a round has launched of one run."""

    run: StageRun
    more: bool
    """Whether the run has more steps."""
    step: int = 0
    """Steps of a denoise that are done with this one."""
    total_steps: int | None = None
    error: Exception | None = None
    """What the run raised, which ended it."""


@dataclass(frozen=True, slots=True)
class Round:
    """One step of some runs, launched together."""

    steps: tuple[RunStep, ...]
    began: float
    """In seconds of a monotonic clock."""
    end: StreamEvent
    """Passes when the device has done the step."""
    ended: float | None = None
    """When it ended, in seconds of a monotonic clock; None if only `end` tells."""

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """Return the attempts of its runs."""
        return tuple(each.run.attempt for each in self.steps)

    @property
    def all_go_on(self) -> bool:
        """Return whether no run ended with this round."""
        return all(each.more for each in self.steps)
