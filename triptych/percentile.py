"""Percentiles, for whatever is measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


def percentile(values: Iterable[float], percent: int) -> float:
    """Return a percentile by nearest rank: the least value that `percent` of 100 values do not exceed; 0 for none."""
    ranked = sorted(values)
    return ranked[max(0, -(-len(ranked) * percent // 100) - 1)] if ranked else 0.0
