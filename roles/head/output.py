"""Resolve the output format and the frame rate of a request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from msgspec.structs import replace

from triptych.engines.parameters.schema import FRAME_RATE_NAMES, LATENT, OUTPUT_TYPE, Signature
from triptych.engines.parameters.serving_config import ParameterError
from triptych.roles.media.formats import FORMATS, LATENTS_FORMAT, formats_for
from triptych.roles.messages.common import Output

_SLOWEST: Final = 1.0
_FASTEST: Final = 240.0


def resolve_output(
    asked: Output, signature: Signature, given: Mapping[str, object], inputs: Mapping[str, object]
) -> Output:
    """Check the output format of a request, and resolve the frame rate of its video.

    Args:
        asked: The output that the request asks for.
        signature: Of the pipeline; without parameters until an instance has loaded it.
        given: The inputs of the request.
        inputs: The same, with the defaults of the model's serving config.

    Returns:
        The same format, or that of latents; and the frames per second of the request, else of the serving config, else
        of the pipeline: 0 if none of them has it, or for another medium.

    Raises:
        ParameterError: A file of the format cannot hold the pipeline's output, or the rate or `output_type` is wrong.
    """
    if (output_type := inputs.get(OUTPUT_TYPE)) is not None:
        if output_type != LATENT:
            raise ParameterError(OUTPUT_TYPE, f"must be {LATENT}, or left out.")
        if asked.format not in ("", LATENTS_FORMAT):
            raise ParameterError(OUTPUT_TYPE, f"cannot be {LATENT} beside a file of the format {asked.format}.")
        return Output(LATENTS_FORMAT, metadata=asked.metadata)
    known = bool(signature.parameters)
    if known and asked.format:
        holds = formats_for(signature.medium, inputs.get("num_frames"))
        if asked.format not in holds:
            raise ParameterError(
                "output_format", f"must be {_or(holds)}: {asked.format} cannot hold {_an(signature.medium)}."
            )
    if asked.format and asked.format not in FORMATS:
        raise ParameterError("output_format", f"must be {_or(tuple(FORMATS))}.")
    if known and signature.medium != "video":
        return replace(asked, fps=0.0)
    return replace(asked, fps=_fps(asked.fps, given, inputs) or signature.fps)


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
