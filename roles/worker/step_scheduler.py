"""Decide which of the runs that an instance holds advance next, and which of them together. Pure: no clock, no tensors.

A run is one stage of an attempt. A denoise takes as many rounds as it has steps; an encode or a decode is a run of one
step. The policy says which run is next; others that can be in one batch with it go along.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

from triptych.actors.topology.sections import SchedulingPolicyName
from triptych.engines.stages import Stage
from triptych.engines.steps.executor import AloneKey
from triptych.roles.messages.common import Attempt, SchedulingHints
from triptych.roles.scheduling_policy import OwnerService, SchedulingFacts, StepTimes, overtaken, rank
from triptych.roles.worker.attempts import ActiveAttempt

_ANY_STEP: Final = "any step"
"""The kind under which the time of every denoising step is learnt, for runs of which nothing is known yet."""


@dataclass(slots=True)
class _HeldRun:
    attempt: Attempt
    serial: int
    """Counts the runs that came."""
    stage: Stage
    hints: SchedulingHints
    due: float
    """When the result is wanted, or is of no use any more: seconds of this host's monotonic clock."""
    steps_left: int | None
    """Of the attempt, with the stages that follow here; None while unknown."""
    batch_key: Hashable = None
    """What has to be equal in a batch; None while unknown."""
    alone: StepTimes = field(default_factory=StepTimes)
    """Of its own steps, while they are computed alone; nobody needs them when it has ended."""
    served: int = 0
    passed_over: int = 0


class StepScheduler:
    """The runs that an instance holds.

    Args:
        policy: Which run is next; a higher priority goes before it, and no run starves (`roles.scheduling_policy`).
        max_batch: Most runs that advance together, at least 1.
    """

    def __init__(self, policy: SchedulingPolicyName, max_batch: int) -> None:
        self.policy = policy
        self.max_batch = max_batch
        self._held: dict[Attempt, _HeldRun] = {}
        self._arrivals = 0
        self._owners = OwnerService()
        self._times = StepTimes()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, attempt: Attempt) -> bool:
        return attempt in self._held

    def add(self, item: ActiveAttempt) -> None:
        """Hold a run of the first of the stages that are left of an attempt; it comes after all that are held."""
        stage, hints = item.stages[0], item.hints
        steps_left: int | None = len(item.stages)
        if Stage.DENOISER in item.stages:
            steps_left = hints.steps + len(item.stages) - 1 if hints.steps else None
        due = min(item.due, item.deadline)
        self._held[item.attempt] = _HeldRun(item.attempt, self._arrivals, stage, hints, due, steps_left)
        self._arrivals += 1
        self._owners.update({run.hints.owner for run in self._held.values()})

    def remove(self, attempt: Attempt) -> None:
        """Forget a run, which has ended or was cancelled; no-op if it is not held."""
        if self._held.pop(attempt, None) is not None:
            self._owners.update({run.hints.owner for run in self._held.values()})

    def next(self, now: float) -> tuple[Attempt, ...]:
        """Choose the runs that take the next step together, the one that the policy puts first at the head.

        Args:
            now: Seconds of this host's monotonic clock.

        Returns:
            At most `max_batch` runs of one bucket, and of one batch key as far as known; empty if none is held.
        """
        facts = {run.serial: self._facts(run, now) for run in self._held.values()}
        order = sorted(self._held.values(), key=lambda run: rank(self.policy, facts[run.serial]))
        chosen = self._batch(order)
        serials = {run.serial for run in chosen}
        passed_over = overtaken(
            (facts[run.serial] for run in order if run.serial not in serials), (facts[run.serial] for run in chosen)
        )
        for run in order:
            run.passed_over += run.serial == passed_over
        for run in chosen:
            run.passed_over = 0
            run.served += 1
            self._owners.add(run.hints.owner, 1 / len(chosen))
        return tuple(run.attempt for run in chosen)

    def stepped(self, attempt: Attempt, step: int, total_steps: int | None, batch_key: Hashable = None) -> None:
        """Record how far a denoise has come.

        Args:
            attempt: A run that `next` has returned; no-op if it is not held any more.
            step: Steps that are done.
            total_steps: Steps of the denoise; None if unknown.
            batch_key: What has to be equal in its next batch; None if unknown.
        """
        run = self._held.get(attempt)
        if run is not None:
            run.batch_key = batch_key
            if total_steps is not None:
                run.steps_left = max(total_steps - step, 1)

    def ran(self, attempts: tuple[Attempt, ...], seconds: float) -> None:
        """Record the duration of a denoising step that these runs took together."""
        runs = [run for attempt in attempts if (run := self._held.get(attempt)) and run.batch_key is not None]
        self._times.learn(_ANY_STEP, seconds)
        for times, kind in {(self._times_of(run), run.batch_key) for run in runs}:
            times.learn(kind, seconds)

    def _times_of(self, run: _HeldRun) -> StepTimes:
        """Return the times that the batch key of a run is a kind of."""
        return run.alone if isinstance(run.batch_key, AloneKey) else self._times

    def _batch(self, order: list[_HeldRun]) -> list[_HeldRun]:
        """Return the first run, and those after it that may share its batch."""
        chosen = order[:1]
        if not chosen or chosen[0].stage is not Stage.DENOISER:
            return chosen
        bucket, key = chosen[0].hints.bucket, chosen[0].batch_key
        for run in order[1:]:
            if len(chosen) >= min(self.max_batch, bucket):
                break
            if run.stage is not Stage.DENOISER or run.hints.bucket != bucket:
                continue
            if key is None or run.batch_key is None or run.batch_key == key:
                chosen.append(run)
                key = run.batch_key if key is None else key
        return chosen

    def _facts(self, run: _HeldRun, now: float) -> SchedulingFacts:
        step_s = self._times_of(run).expected(run.batch_key)
        return SchedulingFacts(
            serial=run.serial,
            priority=run.hints.priority,
            owner_served=self._owners.of(run.hints.owner),
            served=run.served,
            steps_left=run.steps_left,
            step_s=self._times.expected(_ANY_STEP) if step_s is None else step_s,
            deadline_left_s=run.due - now if math.isfinite(run.due) else math.inf,
            passed_over=run.passed_over,
        )
