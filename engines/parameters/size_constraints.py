"""The sizes and numbers of frames that a pipeline can make, from its VAE and its transformer.

For other values, some pipelines raise, and others silently make something smaller.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import msgspec

from triptych.engines.parameters.schema import Parameter

NUM_FRAMES: Final = "num_frames"
SIDES: Final = ("height", "width")
_TEMPORAL: Final = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio", "vae_temporal_scale_factor")
_SPATIAL: Final = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
_PACKED: Final = 4
"""The number of latents that some families pack into the channels of one token."""


def with_size_constraints(parameters: Collection[Parameter], pipeline: Any) -> tuple[Parameter, ...]:
    """Add `multiple_of` to height and width, and `every` to num_frames.

    Args:
        parameters: The parameters of the pipeline.
        pipeline: The pipeline, with its VAE and transformer or stubs of them.
    """
    frames, sides = _first(pipeline, _TEMPORAL), size_multiple(pipeline)
    return tuple(_with_step(parameter, frames, sides) for parameter in parameters)


def size_multiple(pipeline: Any) -> int:
    """Return the number of pixels that height and width must be multiples of; 0 if unknown.

    It is the side of a latent in pixels times the side of a token in latents.
    """
    return _first(pipeline, _SPATIAL) * _patch(pipeline)


def _with_step(parameter: Parameter, frames: int, sides: int) -> Parameter:
    if parameter.name in SIDES and sides > 1:
        return msgspec.structs.replace(parameter, multiple_of=sides)
    # A default that does not fit means that the pipeline counts differently (Helios makes chunks).
    agrees = not isinstance(parameter.default, int) or (frames > 1 and parameter.default % frames == 1)
    if parameter.name == NUM_FRAMES and frames > 1 and agrees:
        return msgspec.structs.replace(parameter, every=frames)
    return parameter


def _patch(pipeline: Any) -> int:
    model = next((getattr(pipeline, name) for name in ("transformer", "unet") if hasattr(pipeline, name)), None)
    config = getattr(model, "config", None) or {}
    patch = config.get("patch_size")
    if isinstance(patch, (list, tuple)) and patch:
        patch = patch[-1]
    if isinstance(patch, int) and patch > 1:
        return patch
    vae = getattr(getattr(pipeline, "vae", None), "config", None) or {}
    channels = vae.get("latent_channels") or vae.get("z_dim")
    is_packed = isinstance(channels, int) and config.get("in_channels") == _PACKED * channels
    return 2 if is_packed and not _counts_tokens(pipeline, vae) else 1


def _counts_tokens(pipeline: Any, vae: Any) -> bool:
    """Whether the VAE scale factor of a pipeline already includes the packing (Ernie-Image)."""
    levels = vae.get("block_out_channels")
    return isinstance(levels, (list, tuple)) and _first(pipeline, _SPATIAL) > 2 ** (len(levels) - 1)


def _first(pipeline: Any, names: Collection[str]) -> int:
    value = next((getattr(pipeline, name) for name in names if hasattr(pipeline, name)), 0)
    return value if isinstance(value, int) else 0
