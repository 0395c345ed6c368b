"""What a pipeline makes: images, video or sound, how fast it plays, and what its results are called.

Read off what diffusers declares, without any table of models. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Final, TypeGuard

from triptych.engines.parameters.schema import FRAME_RATE_NAMES, LATENT, OUTPUT_TYPE, Medium

IMAGES: Final = ("images", "image")
VIDEOS: Final = ("videos", "frames", "video")
SOUNDS: Final = ("audio", "audios", "sound")
"""Names of results; some families make sound beside a video."""
LATENTS: Final = ("latents", "audio_latents")
"""Names of results that are not decoded."""
NSFW: Final = "nsfw_content_detected"
"""The name of what a safety checker says: a list of bool, one for each image, which it has made black then."""
LAYERS: Final = ("rgb", "depth")
"""Results that are one image each, of the same place."""
MAPS: Final = ("prediction",)
"""Results that are arrays, of which a pipeline's image processor draws images: depth, normals, albedo."""
SAMPLING_RATE: Final = "sampling_rate"
"""The name of the samples per second of sound, an int."""
FRAMES_PER_S: Final = 16.0
"""Of Wan, and of whatever says nothing."""

_RATES: Final = ("output_sampling_rate", "sampling_rate", "sample_rate")


def medium_of(results: Collection[str], task: str = "") -> Medium:
    """Say which medium a pipeline makes.

    Args:
        results: Names of what it returns.
        task: Of the model's serving config; a few pipelines of videos also make images, as videos of one frame.
    """
    if not set(VIDEOS).isdisjoint(results):
        return "image" if task.replace("-to-", "2").endswith("2image") else "video"
    return "image" if set(SOUNDS).isdisjoint(results) or not set(IMAGES).isdisjoint(results) else "audio"


def unsupported_result(results: Sequence[str]) -> str:
    """Say what a pipeline makes that is none of these; "" where one of its results is, or nothing is known of them."""
    if not results or not {*IMAGES, *VIDEOS, *SOUNDS, *LAYERS, *MAPS}.isdisjoint(results):
        return ""
    return f"{', '.join(results[:-1])} and {results[-1]}" if len(results) > 1 else results[0]


def results_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Name what the `__call__` of a classic pipeline returns: its code names the class of its results."""
    function = inspect.unwrap(function)
    mentioned = (function.__globals__.get(name) for name in function.__code__.co_names)
    for found in mentioned:
        if isinstance(found, type) and dataclasses.is_dataclass(found) and found.__name__.endswith("Output"):
            return tuple(field.name for field in dataclasses.fields(found))
    return ()


def frames_per_s(medium: str, defaults: Mapping[str, object], pipeline: object) -> float:
    """Say how many frames per second a pipeline's videos have if a request does not say; 0 where it makes none.

    Args:
        medium: That it makes.
        defaults: Of its inputs, by name.
        pipeline: That knows its only rate, where no input tells it.
    """
    if medium != "video":
        return 0.0
    for value in (*(defaults.get(name) for name in FRAME_RATE_NAMES), getattr(pipeline, FRAME_RATE_NAMES[0], None)):
        if _is_rate(value):
            return float(value)
    return FRAMES_PER_S


def wants_latents(values: Mapping[str, object]) -> bool:
    """Whether a request, by its inputs or by a payload that has them, is for latents in place of media."""
    return values.get(OUTPUT_TYPE) == LATENT


def with_sampling_rate(made: Mapping[str, object], pipeline: object) -> dict[str, object]:
    """Put the samples per second beside sound, where the pipeline has not done so and one of its components knows."""
    if SAMPLING_RATE in made or set(SOUNDS).isdisjoint(made):
        return dict(made)
    rate = _sampling_rate(vars(pipeline))
    return dict(made) if rate is None else {**made, SAMPLING_RATE: rate}


def _sampling_rate(components: Mapping[str, object]) -> int | None:
    # A vocoder makes the waveform where there is one; what it gets may be of another rate.
    names = sorted(components, key=lambda name: (name != "vocoder", not name.endswith("vae")))
    for name in names:
        config = getattr(components[name], "config", None)
        for rate in _RATES:
            value: object = getattr(config, rate, None)
            if _is_rate(value):
                return int(value)
    return None


def _is_rate(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
