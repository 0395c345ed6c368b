"""Advance several denoises by one step each, and compute calls of their denoisers together."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from triptych.engines.steps.batching import (
    PER_ROW,
    Arguments,
    LeafRule,
    UnbatchableError,
    arguments_of_call,
    digest,
    merge,
    split,
)
from triptych.engines.steps.denoiser_calls import DenoiserCall
from triptych.engines.steps.denoising import Denoising
from triptych.engines.steps.probing import MergeRules, Prober


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of one denoise.

    Attributes:
        more: Whether it has more steps.
        error: What the step raised, which ended the run; None if it raised nothing.
    """

    more: bool
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class StepRound:
    """One step of some denoises.

    Attributes:
        results: What became of each.
        steps: The steps that each has done by now.
        ended: When the host had launched it, in seconds of a monotonic clock.
    """

    results: tuple[StepResult, ...]
    steps: tuple[int, ...]
    ended: float


class AloneKey(NamedTuple):
    """The batch key of a run whose last call was computed alone: no other run has an equal one."""

    run: int
    """Its `id`, which a later run may have again."""
    number: int
    """Of the call in the step."""


class WaitingCall(NamedTuple):
    """A call that waits and can be merged with others."""

    call: DenoiserCall
    arguments: Arguments


class StepExecutor:
    """Advances denoises of one model, on the thread that owns the device.

    Calls of their denoisers that wait at the same time are merged if their signatures are the same and their runs have
    the same `bucket` and `adapters`. A merged call has as many calls as the bucket; missing ones are repetitions of the
    first. So the bits of a run do not depend on the others, or on whether there are any. Calls of runs with a step
    cache are computed alone, since each has its own state.

    Attributes:
        group_sizes: How many forwards had how many calls of runs in them, without repetitions.
    """

    def __init__(self) -> None:
        self.group_sizes: collections.Counter[int] = collections.Counter()
        self._prober = Prober()

    def advance(self, denoisings: Sequence[Denoising]) -> list[StepResult]:
        """Run one step of each; an error of one does not end the others.

        Returns:
            A result for each, in the same order.
        """
        results: dict[int, StepResult] = {}
        live = list(denoisings)
        while live:
            calls = []
            for run in live:
                try:
                    call = run.proceed()
                except Exception as error:  # noqa: BLE001 - it belongs to this run alone; the caller reports it
                    results[id(run)] = StepResult(False, error)
                else:
                    if call is None:
                        results[id(run)] = StepResult(not run.over)
                    else:
                        calls.append(call)
            self._compute(calls)
            live = [call.run for call in calls]
        return [results[id(run)] for run in denoisings]

    def advance_for(
        self, denoisings: Sequence[Denoising], seconds: float, interrupted: Callable[[], bool]
    ) -> list[StepRound]:
        """Run one step of each, and further ones while they take no longer than `seconds` together.

        A call that takes several short steps saves the way to the event loop and back after each. It ends before the
        last step of a run, after a step in which a run ended, and as soon as it is interrupted.

        Args:
            denoisings: The runs.
            seconds: No further step is begun after so long; 0 for one step.
            interrupted: Is asked between two steps whether something else is to be done.

        Returns:
            A round for each step.
        """
        began, rounds = time.monotonic(), []
        while True:
            results, ended = tuple(self.advance(denoisings)), time.monotonic()
            rounds.append(StepRound(results, tuple(run.step for run in denoisings), ended))
            if ended - began >= seconds or interrupted() or not all(result.more for result in results):
                return rounds
            if any(run.total_steps is None or run.step >= run.total_steps - 1 for run in denoisings):
                return rounds

    def _compute(self, calls: Sequence[DenoiserCall]) -> None:
        groups: dict[Hashable, list[WaitingCall]] = {}
        for call in calls:
            run = call.run
            alone = run.bucket == 1 or run.step_cache is not None or run.edits_modules
            if run.edits_modules and run.bucket > 1:
                self._prober.note_alone(call, "the run has changed the attention processors")
            try:
                waiting = None if alone else WaitingCall(call, arguments_of_call(call))
            except UnbatchableError as error:
                waiting = None
                self._prober.note_alone(call, str(error))
            if waiting is None:
                call.run.batch_key = AloneKey(id(call.run), call.number)
                self._compute_alone(call)
            else:
                key = (id(call.module), call.run.adapters, call.run.bucket, waiting.arguments.outline)
                call.run.batch_key = hash(key)
                groups.setdefault(key, []).append(waiting)
        for group in groups.values():
            self._compute_group(group)

    def _compute_alone(self, call: DenoiserCall) -> None:
        self.group_sizes[1] += 1
        call.compute()

    def _compute_group(self, group: Sequence[WaitingCall]) -> None:
        """Compute calls of one outline, as few forwards as their values allow."""
        first, bucket = group[0], group[0].call.run.bucket
        try:
            first.call.run.adapt()
            rules = self._prober.rules(first.call, first.arguments)
            parts = [] if rules.alone else list(self._of_equal_values(group, rules))
        except Exception as error:  # noqa: BLE001 - what the first call raises alone belongs to its run
            first.call.error = error
            if len(group) > 1:
                self._compute_group(group[1:])
            return
        if rules.alone:
            for waiting in group:
                self._compute_alone(waiting.call)
        for part in parts:
            for at in range(0, len(part), bucket):
                self.compute_merged(part[at : at + bucket], rules)

    def _of_equal_values(self, group: Sequence[WaitingCall], rules: MergeRules) -> Iterator[list[WaitingCall]]:
        """Split a group into those whose values are equal where they must be."""
        first = group[0]
        must_be_equal = []
        for index, leaf in enumerate(first.arguments.leaves):
            if leaf.rule is LeafRule.VALUE or rules.per_row.get(leaf.path):
                continue
            can_differ = leaf.rule in PER_ROW and leaf.path not in rules.shared and leaf.path not in rules.per_row
            if can_differ and len({digest(each.arguments.leaves[index].value) for each in group}) > 1:
                self._prober.try_leaf(first.call, first.arguments, leaf)
            if not rules.per_row.get(leaf.path):
                must_be_equal.append(index)
        parts: dict[Hashable, list[WaitingCall]] = {}
        for each in group:
            values = tuple(digest(each.arguments.leaves[index].value) for index in must_be_equal)
            parts.setdefault(values, []).append(each)
        yield from parts.values()

    def compute_merged(self, group: Sequence[WaitingCall], rules: MergeRules) -> None:
        """Compute calls of equal signature in one forward, padded to the bucket."""
        first = group[0]
        filled = [*group, *([first] * (first.call.run.bucket - len(group)))]
        by_item = any(leaf.rule is LeafRule.ITEMS for leaf in first.arguments.leaves)
        try:
            first.call.run.adapt()
            output = first.call.forward(**merge([each.arguments for each in filled], rules.shared))
            outputs = split(output, first.arguments.rows, len(filled), by_item=by_item)
        except torch.OutOfMemoryError as error:
            for each in group:
                each.call.error = error
        except Exception:  # noqa: BLE001 - one of the calls is at fault: each finds out by itself, with the same bits
            if len(group) == 1:
                self._compute_alone(first.call)
            else:
                for each in group:
                    self.compute_merged([each], rules)
        else:
            self.group_sizes[len(group)] += 1
            for each, output in zip(group, outputs, strict=False):
                each.call.output = output
