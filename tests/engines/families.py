"""Tests of every pipeline: a handful of them in each run, all when diffusers moves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

PIPELINES = frozenset(
    f"{family}ModularPipeline" for family in ("Flux", "Wan", "StableDiffusionXL", "QwenImage", "LTX2", "HunyuanVideo15")
)


def all_families(values: Iterable[str], handful: Iterable[str] = PIPELINES) -> list[Any]:
    """Parameters of a test: those that are not of the handful are run by `make test-families`."""
    few = frozenset(handful)
    return [value if value in few else pytest.param(value, marks=pytest.mark.families) for value in values]
