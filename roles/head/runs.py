"""The runs of a job as the head sees them: which instance had which of its stages, and when. Pure.

A run is one stage of an attempt. Here it begins as the job is assigned to an instance, and then has its inputs,
computes, and ends; what was not told of it keeps the time 0. The same run on its instance, where it begins with its
first round, is `roles.worker.stage_run.StageRun`, and the span `roles.timeline.RUN` in a trace.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from msgspec.structs import replace

from triptych.engines.stages import Stage
from triptych.roles.head.job import WAITING
from triptych.roles.messages.requests import RunView, StepMark, Transition

MAX_RUNS: Final = 64
"""Most runs of a job that are kept, the newest: a job that is parked or lost again and again has more."""
MAX_MARKS: Final = 48
"""Most steps of a run whose times are kept."""
PARKED: Final = "parked for a more urgent job"
"""End of the reason of a run that was."""


def assign(runs: list[RunView], stage: Stage, instance: str, attempt: int, now: float) -> None:
    """Begin a run."""
    runs.append(RunView(stage.value, instance, attempt, now))
    del runs[:-MAX_RUNS]


def start(runs: list[RunView], stage: Stage, now: float, waited_s: float) -> None:
    """Record that the stage computes; where that is another one than before, as in a monolithic role, a new run begins.

    Args:
        runs: Of the job.
        stage: The stage that computes.
        now: Unix seconds.
        waited_s: Seconds that the instance had its inputs and did not compute.
    """
    run = _open(runs)
    if run is None:
        return
    if run.stage != stage.value and run.started_at:
        runs[-1] = replace(run, computed_at=now, ended_at=now)
        assign(runs, stage, run.instance, run.attempt, now)
        run = runs[-1]
    if not run.started_at:
        loaded_at = max(run.assigned_at, now - waited_s)
        runs[-1] = replace(run, stage=stage.value, loaded_at=loaded_at, started_at=now)


def step(runs: list[RunView], number: int, now: float) -> None:
    """Record the end of a step."""
    run = _open(runs)
    if run is not None:
        runs[-1] = replace(run, steps=(*thin(run.steps, number), StepMark(number, now)))


def thin(marks: tuple[StepMark, ...], newest: int) -> tuple[StepMark, ...]:
    """Return at most `MAX_MARKS` of the marks before the step `newest`, at equal distances."""
    distance = 1 << ((newest - marks[0].step) // MAX_MARKS).bit_length() if marks else 1
    if distance == 1:
        return marks
    kept = [marks[0]]
    for mark in marks:
        if mark.step - kept[-1].step >= distance:
            kept.append(mark)
    return tuple(kept)


def end(runs: list[RunView], now: float, *, seconds: float = 0.0, reason: str = "") -> None:
    """End the run that is open, if there is one.

    Args:
        runs: Of the job.
        now: Unix seconds.
        seconds: Of the computation, for one that has made something.
        reason: Why it came to nothing.
    """
    run = _open(runs)
    if run is None:
        return
    if seconds or not reason:  # a head that was away was not told of its start
        run = replace(run, started_at=run.started_at or max(run.assigned_at, now - seconds))
        run = replace(run, loaded_at=run.loaded_at or run.started_at, computed_at=min(now, run.started_at + seconds))
    runs[-1] = replace(run, ended_at=now, reason=reason)


def unassigned_since(history: Iterable[Transition], run: RunView, ended_at: float) -> float:
    """Return when a job last came to wait before a run was assigned, in Unix seconds.

    Args:
        history: Of the job.
        run: One of its runs.
        ended_at: When the run before it ended; 0 if it is the first.
    """
    came = [move.at for move in history if move.state in WAITING.values() and move.at <= run.assigned_at]
    return max([ended_at, *came[-1:]]) or run.assigned_at


def _open(runs: list[RunView]) -> RunView | None:
    return runs[-1] if runs and not runs[-1].ended_at else None
