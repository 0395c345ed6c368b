"""Which sizes and numbers of frames a pipeline can make, read off its VAE and its transformer.

Asked for others, some pipelines raise, and the rest make something smaller without a word.
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
"""Pixels of a latent that some families put into the channels of one token."""


def with_size_constraints(parameters: Collection[Parameter], pipeline: Any) -> tuple[Parameter, ...]:
    """Say of which numbers sizes are multiples, and the number of frames is one more than one.

    Args:
        parameters: That the pipeline declares.
        pipeline: Of diffusers, with its VAE and transformer or stubs of them.
    """
    frames, sides = _first(pipeline, _TEMPORAL), size_multiple(pipeline)
    return tuple(_with_step(parameter, frames, sides) for parameter in parameters)


def size_multiple(pipeline: Any) -> int:
    """The number that height and width in pixels must be multiples of; 0 where that is not known.

    It is the pixels of a latent times the latents of a token, on one side.
    """
    return _first(pipeline, _SPATIAL) * _patch(pipeline)


def _with_step(parameter: Parameter, frames: int, sides: int) -> Parameter:
    if parameter.name in SIDES and sides > 1:
        return msgspec.structs.replace(parameter, multiple_of=sides)
    # A default that is no such number means that the pipeline counts in another way (Helios makes chunks).
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
    """Whether what a pipeline calls the factor of its VAE has the packing in it already (Ernie-Image)."""
    levels = vae.get("block_out_channels")
    return isinstance(levels, (list, tuple)) and _first(pipeline, _SPATIAL) > 2 ** (len(levels) - 1)


def _first(pipeline: Any, names: Collection[str]) -> int:
    value = next((getattr(pipeline, name) for name in names if hasattr(pipeline, name)), 0)
    return value if isinstance(value, int) else 0
