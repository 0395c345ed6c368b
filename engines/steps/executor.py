"""Advance several denoises by one step each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from triptych.engines.steps.denoising import Denoising


@dataclass(frozen=True, slots=True)
class StepResult:
    """What became of one denoise.

    Attributes:
        more: Whether it has more steps.
        error: What the step raised, which ended the run; None if it raised nothing.
    """

    more: bool
    error: Exception | None = None


class StepExecutor:
    """Advances denoises of one model, on the thread that owns the device."""

    def advance(self, denoisings: Sequence[Denoising]) -> list[StepResult]:
        """Run one step of each; an error of one does not end the others.

        Returns:
            A result for each, in the same order.
        """
        return [self._advance_one(denoising) for denoising in denoisings]

    def _advance_one(self, denoising: Denoising) -> StepResult:
        try:
            return StepResult(denoising.advance())
        except Exception as error:  # noqa: BLE001 - it belongs to this run alone; the caller reports it
            return StepResult(False, error)
