"""What a pipeline makes: images, video or sound, their rates, and the names of its results. Imports no torch.

It follows from what diffusers declares; there is no table of models.
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
"""Names of results; some families make sound with a video."""
LATENTS: Final = ("latents", "audio_latents")
"""Names of results that are not decoded: latents."""
NSFW: Final = "nsfw_content_detected"
"""The name of a safety checker's result: a list of bool, for each image whether it was blacked out."""
LAYERS: Final = ("rgb", "depth")
"""Names of results that are one image each."""
MAPS: Final = ("prediction",)
"""Names of results that are arrays, drawn by the pipeline's image processor: depth, normals, albedo."""
SAMPLING_RATE: Final = "sampling_rate"
"""The name of the sampling rate of sound in Hz, an int."""
FRAMES_PER_S: Final = 16.0
"""The default frame rate: that of Wan."""

_RATES: Final = ("output_sampling_rate", "sampling_rate", "sample_rate")


def medium_of(results: Collection[str], task: str = "") -> Medium:
    """Return the medium that a pipeline makes.

    Args:
        results: The names of its results.
        task: The task of the serving config; a few video pipelines also make images, as videos of one frame.
    """
    if not set(VIDEOS).isdisjoint(results):
        return "image" if task.replace("-to-", "2").endswith("2image") else "video"
    return "image" if set(SOUNDS).isdisjoint(results) or not set(IMAGES).isdisjoint(results) else "audio"


def unsupported_result(results: Sequence[str]) -> str:
    """Return the results of a pipeline if none of them is a medium, as text; "" otherwise, or if they are unknown."""
    if not results or not {*IMAGES, *VIDEOS, *SOUNDS, *LAYERS, *MAPS}.isdisjoint(results):
        return ""
    return f"{', '.join(results[:-1])} and {results[-1]}" if len(results) > 1 else results[0]


def results_of(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the results of a `__call__`, from the output class that its code names."""
    function = inspect.unwrap(function)
    mentioned = (function.__globals__.get(name) for name in function.__code__.co_names)
    for found in mentioned:
        if isinstance(found, type) and dataclasses.is_dataclass(found) and found.__name__.endswith("Output"):
            return tuple(field.name for field in dataclasses.fields(found))
    return ()


def frames_per_s(medium: str, defaults: Mapping[str, object], pipeline: object) -> float:
    """Return the default frames per second of a pipeline's videos; 0 if it makes none.

    Args:
        medium: The medium that it makes.
        defaults: The defaults of its inputs by name.
        pipeline: The pipeline, whose attribute is its rate if no input sets it.
    """
    if medium != "video":
        return 0.0
    for value in (*(defaults.get(name) for name in FRAME_RATE_NAMES), getattr(pipeline, FRAME_RATE_NAMES[0], None)):
        if _is_rate(value):
            return float(value)
    return FRAMES_PER_S


def wants_latents(values: Mapping[str, object]) -> bool:
    """Whether the inputs or the payload of a request ask for latents instead of media."""
    return values.get(OUTPUT_TYPE) == LATENT


def with_sampling_rate(made: Mapping[str, object], pipeline: object) -> dict[str, object]:
    """Add the sampling rate to results with sound, from the components of the pipeline."""
    if SAMPLING_RATE in made or set(SOUNDS).isdisjoint(made):
        return dict(made)
    rate = _sampling_rate(vars(pipeline))
    return dict(made) if rate is None else {**made, SAMPLING_RATE: rate}


def _sampling_rate(components: Mapping[str, object]) -> int | None:
    # Prefer the vocoder, which makes the waveform; its input may have another rate.
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
