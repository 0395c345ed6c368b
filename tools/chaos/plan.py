"""The plan of a run: requests and faults, drawn from a seed before anything starts."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

T = TypeVar("T")

TRIGGERS = {"running": 5, "stored": 2, "any": 1, "idle": 1}
"""How often a fault is injected: while the victim has a job assigned (any stage runs, where the victim is no
role); while leases are held and tensors wait or are transferred; at once; when no request is active."""

PROMPTS = (
    "a large red circle on the left of a blue background",
    "a small green square in the centre of a white background",
    "a large yellow triangle on the right of a black background",
    "a small blue circle on the right of a red background",
)
SEEDS = (1, 2)
SHAPES = {(4, 64): 8, (30, 64): 3, (100, 64): 3, (200, 64): 1, (4, 192): 1, (4, 320): 1}
"""How often steps and pixels a side are asked for: quick ones, ones that run long enough for a fault to hit them,
and ones whose latents take up to all that the pool gives to one payload."""
RANGES = {"num_inference_steps": [1, 1000], "height": [64, 512, 8], "width": [64, 512, 8]}
"""The ranges that the model's serving config has to allow."""
POOL_SIZE = "256KiB"
"""The largest payload takes half of it, so that the pool is nearly full at times."""
HOST_POOL_SIZE = "512KiB"
"""The same where a host has one pool for what its encoders and denoisers make, and for what comes in."""
PRIORITIES = {0: 8, 1: 1, -1: 1}
"""How often a request has a priority."""
DEADLINES_S = {None: 3, 2.0: 1, 10.0: 1}
"""How often a request has a deadline of so many seconds."""
PARTIAL_IMAGES = {0: 4, 3: 1}
"""How often a request asks for previews, and for how many."""
REPEAT_SHARE = 0.15
"""Share of faults that are injected twice: the second time as soon as the victim has recovered."""


class ImageCase(NamedTuple):
    """The inputs of an image; equal inputs give equal bytes."""

    prompt: str
    seed: int
    steps: int
    side: int
    """Height and width in pixels."""


# Each prompt comes with both seeds, but not with both in each shape: all are made once before the first fault.
IMAGES = tuple(
    ImageCase(prompt, SEEDS[k % len(SEEDS)], *shape)
    for k, (prompt, shape) in enumerate(itertools.product(PROMPTS, SHAPES))
)
CHANGED = tuple(image for image in IMAGES if image.steps == 30)
"""The requests that are active when a cluster is stopped and started with another topology."""
_OFTEN = tuple(SHAPES[image.steps, image.side] for image in IMAGES)


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request that a client will send."""

    number: int
    at_s: float
    """Seconds after the start of the load."""
    image: ImageCase
    priority: int = 0
    deadline_s: float | None = None
    partial_images: int = 0


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """A fault that will be injected."""

    at_s: float
    fault: str
    victim: str
    """Name of a component."""
    trigger: str
    twice: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """The plan of a run."""

    requests: tuple[PlannedRequest, ...]
    faults: tuple[PlannedFault, ...]


def make_plan(
    seed: int, duration_s: float, rate: float, every_s: float, faults: Sequence[str], victims: dict[str, list[str]]
) -> Plan:
    """Make a plan; equal arguments give equal plans.

    Args:
        seed: of the drawing.
        duration_s: seconds of load.
        rate: requests a second, on average, at random moments.
        every_s: Mean seconds between two faults.
        faults: names.
        victims: The names of the components that a fault may hit, by fault; a fault with none is not planned.
    """
    rng = random.Random(seed)
    requests = tuple(
        PlannedRequest(
            number,
            at_s,
            rng.choices(IMAGES, _OFTEN)[0],
            _drawn(rng, PRIORITIES),
            _drawn(rng, DEADLINES_S),
            _drawn(rng, PARTIAL_IMAGES),
        )
        for number, at_s in enumerate(_arrival_times(rng, duration_s, 1 / rate))
    )
    possible = [fault for fault in faults if victims.get(fault)]
    # The last seconds are left for the last victims to come back under load.
    times = _arrival_times(rng, duration_s - every_s, every_s) if possible else []
    planned = [
        PlannedFault(at_s, fault, rng.choice(victims[fault]), _drawn(rng, TRIGGERS), rng.random() < REPEAT_SHARE)
        # Each fault comes in its turn, so that a short run has them all.
        for at_s, fault in zip(times, _in_turn(rng, possible, len(times)), strict=True)
    ]
    return Plan(requests, tuple(planned))


def _drawn(rng: random.Random, often: Mapping[T, int]) -> T:
    return rng.choices(tuple(often), tuple(often.values()))[0]


def _arrival_times(rng: random.Random, duration_s: float, mean_s: float) -> list[float]:
    moments, at_s = [], rng.expovariate(1 / mean_s)
    while at_s < duration_s:
        moments.append(at_s)
        at_s += rng.expovariate(1 / mean_s)
    return moments


def _in_turn(rng: random.Random, faults: Sequence[str], n: int) -> list[str]:
    turns: list[str] = []
    while len(turns) < n:
        turns += rng.sample(list(faults), len(faults))
    return turns[:n]
