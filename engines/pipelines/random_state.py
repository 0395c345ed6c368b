"""The random state of a request: its generator, and torch's global generators during its run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final, Self

import torch

GENERATOR: Final = "generator"
"""The name of the generator in pipelines and payloads."""
SEED: Final = "request_seed"
"""The key in a payload of the request's seed, which pipelines do not know."""


def seeded_generator(seed: int) -> torch.Generator:
    """Make the generator of a request, on the CPU: only there a seed makes the same noise for every device."""
    return torch.Generator("cpu").manual_seed(seed)


def is_unused(generator: torch.Generator) -> bool:
    """Whether nothing has been drawn from a generator since it was seeded, also before it was sent to this stage."""
    return torch.equal(generator.get_state(), seeded_generator(generator.initial_seed()).get_state())


class GlobalRngGuard:
    """Gives torch's global generators a state of their own for one run, derived from its seed.

    Some schedulers (stochastic flow matching, LCM, SDE solvers) and text samplers take no generator and draw from the
    global ones. Enter this context around all computation of a run: then the same seed makes the same image, whatever
    ran before and however often the run is interrupted. Entering it again continues from the state at its exit. Not
    thread-safe: one thread owns the device.

    Args:
        seed: The seed of the request.
        purpose: The purpose of the run, such as its stage. Different purposes have unrelated random numbers, which are
            also unrelated to those of `seeded_generator(seed)`.
    """

    def __init__(self, seed: int, purpose: str) -> None:
        digest = hashlib.blake2b(f"{purpose} {seed}".encode(), digest_size=8).digest()
        self._start = int.from_bytes(digest, "big") >> 1
        self._states: list[torch.Tensor] = []
        self._outside: list[torch.Tensor] = []
        self._begun: list[torch.Tensor] = []

    @property
    def was_used(self) -> bool:
        """Whether the run had drawn from a global generator, or seeded one, at the last exit."""
        return not all(map(torch.equal, self._begun, self._states))

    def saved(self, device: torch.device) -> dict[str, torch.Tensor] | None:
        """Return the states at the last exit of the generators of the CPU and of a device; None if unused."""
        if not self.was_used:
            return None
        saved = {"cpu": self._states[0].clone()}
        if device.type == "cuda":
            saved["cuda"] = self._states[1 + _index(device)].clone()
        return saved

    def set(self, saved: Mapping[str, torch.Tensor] | None, device: torch.device) -> None:
        """Go on from states that another guard has `saved`; for use inside of this context."""
        if saved is None:
            return
        torch.set_rng_state(saved["cpu"].cpu())
        if "cuda" in saved and device.type == "cuda":
            torch.cuda.set_rng_state(saved["cuda"].cpu(), _index(device))

    def __enter__(self) -> Self:
        """Save the present state, and set that of the run."""
        self._outside = _states()
        if len(self._states) < len(self._outside):  # the first time, or CUDA has been initialized since
            torch.default_generator.manual_seed(self._start)
            if len(self._outside) > 1:
                torch.cuda.manual_seed_all(self._start)
            begun = _states()
            self._begun += begun[len(self._begun) :]
            self._states += begun[len(self._states) :]
        _restore(self._states)
        return self

    def __exit__(self, *_: object) -> None:
        """Save the state of the run, and restore the one before."""
        self._states = _states()[: len(self._outside)]
        _restore(self._outside)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _states() -> list[torch.Tensor]:
    """Return the states of the generators of the CPU and, if CUDA is initialized, of its devices."""
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if in_use else ())]


def _restore(states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
