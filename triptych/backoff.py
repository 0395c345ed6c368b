"""Exponential backoff with jitter, for whatever is tried again."""

from __future__ import annotations

import random


def backoff_s(pauses: int, *, first_s: float = 0.05, longest_s: float = 1.0, jitter: float | None = None) -> float:
    """Return the seconds to pause before the next try.

    The pause doubles with each one, so that what is overloaded can recover. The jitter takes up to half off, so that
    those who failed together do not come back together.

    Args:
        pauses: how many came before this one.
        first_s: the first pause, without jitter.
        longest_s: the longest pause, without jitter.
        jitter: in [0, 1]; None draws one.
    """
    if jitter is None:
        jitter = random.random()  # noqa: S311  keeps no secret
    return min(longest_s, first_s * 2.0 ** min(pauses, 32)) * (1 - jitter / 2)  # 32 doublings are past any bound
