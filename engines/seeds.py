"""The generator of a request, and whether anything has been drawn from it yet."""

from __future__ import annotations

import torch


def seeded(seed: int) -> torch.Generator:
    """Make the generator of a request.

    It is on the CPU, because only there does a seed make the same noise on every device.
    """
    return torch.Generator("cpu").manual_seed(seed)


def is_fresh(generator: torch.Generator) -> bool:
    """Whether nothing has been drawn from a generator since it was made from its seed; also of one that crossed."""
    return torch.equal(generator.get_state(), seeded(generator.initial_seed()).get_state())
