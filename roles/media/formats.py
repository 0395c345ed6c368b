"""Which files can hold what a pipeline makes, and how the head resolves the format that a request asks for.

Imports nothing that could write one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from triptych.engines.parameters.schema import FRAME_RATE_NAMES, LATENT, OUTPUT_TYPE, Signature
from triptych.engines.parameters.serving_config import ParameterError
from triptych.roles.messages.common import Output

CONTENT_TYPES: Final[Mapping[str, str]] = {
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "gif": "image/gif",
    "mp4": "video/mp4",
    "zip": "application/zip",
    "wav": "audio/wav",
    "safetensors": "application/octet-stream",
}
"""Output formats, and what the web calls them."""
LATENTS_FORMAT: Final = "safetensors"
"""The one that holds latents, and nothing else."""
_HOLDS: Final[Mapping[str, tuple[str, ...]]] = {
    "image": ("png", "jpeg", "webp", "gif", "zip"),
    "video": ("mp4", "webp", "gif", "png", "zip"),
    "audio": ("wav",),
}
_SLOWEST: Final = 1.0
_FASTEST: Final = 240.0


def formats_for(medium: str, frames: object = None) -> tuple[str, ...]:
    """Name the formats that can hold a medium, the one that suits it first.

    Args:
        medium: "image", "video" or "audio".
        frames: Of a video, where they are known: one alone is an image as well.
    """
    holds = _HOLDS[medium]
    return (*holds, "jpeg") if medium == "video" and frames == 1 else holds


def resolve_output(
    asked: Output, signature: Signature, given: Mapping[str, object], inputs: Mapping[str, object]
) -> Output:
    """Check the format that a request asks for, and say how fast its video plays.

    Args:
        asked: What the request says of its result.
        signature: Of the pipeline; without parameters where no instance has loaded it yet.
        given: Inputs that the request names.
        inputs: The same, with the defaults of the model's serving config.

    Returns:
        The same format; and the frames per second that the request names, else the serving config, else the pipeline: 0
        where none of them does, or no video is made. Of latents, "safetensors".

    Raises:
        CardError: The pipeline makes nothing that such a file could hold, or the rate is none, or `output_type`.
    """
    if (output_type := inputs.get(OUTPUT_TYPE)) is not None:
        if output_type != LATENT:
            raise ParameterError(OUTPUT_TYPE, f"must be {LATENT}, or left out.")
        if asked.format not in ("", LATENTS_FORMAT):
            raise ParameterError(OUTPUT_TYPE, f"cannot be {LATENT} beside a file of the format {asked.format}.")
        return Output(LATENTS_FORMAT)
    known = bool(signature.parameters)
    if known and asked.format:
        holds = formats_for(signature.medium, inputs.get("num_frames"))
        if asked.format not in holds:
            raise ParameterError(
                "output_format", f"must be {_or(holds)}: {asked.format} cannot hold {_an(signature.medium)}."
            )
    if asked.format and asked.format not in CONTENT_TYPES:
        raise ParameterError("output_format", f"must be {_or(tuple(CONTENT_TYPES))}.")
    if known and signature.medium != "video":
        return Output(asked.format, quality=asked.quality)
    return Output(asked.format, _fps(asked.fps, given, inputs) or signature.fps, asked.quality)


def _fps(asked: float, *in_turn: Mapping[str, object]) -> float:
    if asked:
        return _checked("fps", asked)
    for values in in_turn:
        for name in FRAME_RATE_NAMES:
            if (value := values.get(name)) is not None:
                return _checked(name, value)
    return 0.0


def _checked(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ParameterError(name, "must be a number.")
    if not _SLOWEST <= value <= _FASTEST:
        raise ParameterError(name, f"must be {_SLOWEST:g} to {_FASTEST:g}.")
    return float(value)


def _an(medium: str) -> str:
    return {"image": "an image", "video": "a video", "audio": "sound"}[medium]


def _or(formats: tuple[str, ...]) -> str:
    return " or ".join(filter(None, (", ".join(formats[:-1]), formats[-1])))
