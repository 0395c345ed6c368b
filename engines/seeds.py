"""The generator of a request, and whether anything has been drawn from it, or past it."""

from __future__ import annotations

import secrets
from typing import Final, Self

import torch

GENERATOR: Final = "generator"
"""What pipelines and states call it."""


def seeded(seed: int) -> torch.Generator:
    """Make the generator of a request.

    It is on the CPU, because only there does a seed make the same noise on every device.
    """
    return torch.Generator("cpu").manual_seed(seed)


def is_fresh(generator: torch.Generator) -> bool:
    """Whether nothing has been drawn from a generator since it was made from its seed; also of one that crossed."""
    return torch.equal(generator.get_state(), seeded(generator.initial_seed()).get_state())


class Ambient:
    """Tells whether something draws from torch's own generators, or seeds them, in a `with` block.

    What samples text does so. They are put to a place that no seed of a request leads to, since a block that seeds them
    alike each time would leave them as it found them; and back again, unless they were touched.
    """

    def __init__(self) -> None:
        self.touched = False
        """Known at the end of the block."""

    def __enter__(self) -> Self:
        """Put them there."""
        self._before = _ambient()
        place = secrets.randbits(63)
        torch.default_generator.manual_seed(place)
        if len(self._before) > 1:
            torch.cuda.manual_seed_all(place)
        self._placed = _ambient()
        return self

    def __exit__(self, *_: object) -> None:
        """See whether they are still there."""
        self.touched = not all(map(torch.equal, self._placed, _ambient()))
        if not self.touched:
            torch.set_rng_state(self._before[0])
            if len(self._before) > 1:
                torch.cuda.set_rng_state_all(self._before[1:])


def _ambient() -> list[torch.Tensor]:
    """The state of the generator of the CPU, and of those of CUDA where that is in use."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if in_use else ())]
