"""The generator of a request, and whether anything has been drawn from it, or past it."""

from __future__ import annotations

import hashlib
from typing import Final, Self

import torch

GENERATOR: Final = "generator"
"""What pipelines and states call it."""
SEED: Final = "request_seed"
"""The name in a state of the seed that was asked for, of which pipelines themselves know nothing."""


def seeded_generator(seed: int) -> torch.Generator:
    """Make the generator of a request.

    It is on the CPU, because only there does a seed make the same noise on every device.
    """
    return torch.Generator("cpu").manual_seed(seed)


def is_unused(generator: torch.Generator) -> bool:
    """Whether nothing has been drawn from a generator since it was made from its seed; also of one that crossed."""
    return torch.equal(generator.get_state(), seeded_generator(generator.initial_seed()).get_state())


class GlobalRngGuard:
    """Torch's global generators, in a state that belongs to one run and follows from its seed.

    Some schedulers (stochastic flow matching, LCM, SDE solvers) and samplers of text take no generator: they draw from
    the global ones. A run enters this wherever it computes. It then draws what it would draw if it were alone, so the
    same seed makes the same image whatever ran before and however often the run is interrupted. Entered again, it
    goes on where it was left. Not safe for threads: one thread owns the device.

    Args:
        seed: Of the request.
        purpose: Of the run, such as its stage. What two purposes draw is unrelated, and unrelated to
        `seeded_generator(seed)`.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        digest = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest()
        self._start = int.from_bytes(digest, "big") >> 1
        self._states: list[torch.Tensor] = []
        self._outside: list[torch.Tensor] = []
        self._begun: list[torch.Tensor] = []

    @property
    def was_used(self) -> bool:
        """Whether the run has drawn from a global generator or seeded one, by the end of the last block."""
        return not all(map(torch.equal, self._begun, self._states))

    def __enter__(self) -> Self:
        """Put the state of the run in place of the present one."""
        self._outside = _states()
        if len(self._states) < len(self._outside):  # the first time, or CUDA has come into use since
            torch.default_generator.manual_seed(self._start)
            if len(self._outside) > 1:
                torch.cuda.manual_seed_all(self._start)
            begun = _states()
            self._begun += begun[len(self._begun) :]
            self._states += begun[len(self._states) :]
        _restore(self._states)
        return self

    def __exit__(self, *_: object) -> None:
        """Keep the state of the run, and put back what was there."""
        self._states = _states()[: len(self._outside)]
        _restore(self._outside)


def _states() -> list[torch.Tensor]:
    """The state of the generator of the CPU, and of those of CUDA where that is in use."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if in_use else ())]


def _restore(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
