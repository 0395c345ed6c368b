"""The form in which every benchmark reports."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def compare(
    bench: str,
    case: str,
    unit: str,
    *,
    ours: Sequence[float],
    peer: str,
    peer_values: Sequence[float],
    higher_is_better: bool = True,
) -> dict[str, Any]:
    """Make the row of a case: the medians of interleaved rounds, and `ratio` > 1 where ours is better.

    `ratio` is None where it would be infinite, as for no step that is computed again.
    """
    mine, theirs = statistics.median(ours), statistics.median(peer_values)
    over, under = (mine, theirs) if higher_is_better else (theirs, mine)
    ratio = over / under if under else None
    return {
        "bench": bench,
        "case": case,
        "unit": unit,
        "ours": _rounded(mine),
        "peer": peer,
        "peer_value": _rounded(theirs),
        "ratio": None if ratio is None else _rounded(ratio),
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
