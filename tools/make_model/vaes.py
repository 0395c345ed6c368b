"""VAEs, tiny but for one, and most with one level less than the originals: what pipelines assume does not hold."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage, AutoencoderKLWan, AutoencoderTiny

_LATENTS_MEAN = [0.1, -0.2, 0.3, 0.0]
_LATENTS_STD = [1.5, 1.2, 0.8, 1.1]


def tiny() -> AutoencoderTiny:
    """Three levels, not the usual four: its images are 4 times as large as latents, where pipelines assume 8."""
    return AutoencoderTiny(
        encoder_block_out_channels=(16, 16, 16),
        decoder_block_out_channels=(16, 16, 16),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=4,
        scaling_factor=0.9,
        shift_factor=0.1,
    )


def kl(
    *, quant: bool = False, shift: float | None = 0.11, levels: int = 3, latent_channels: int = 4, **more: Any
) -> AutoencoderKL:
    """Some levels; `shift` is None for models that have none."""
    return AutoencoderKL(
        block_out_channels=(16,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        scaling_factor=0.36,
        shift_factor=shift,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **more,
    )


def kl_full() -> AutoencoderKL:
    """Four levels, and statistics of the latents in the place of one factor."""
    return kl(levels=4, latents_mean=_LATENTS_MEAN, latents_std=_LATENTS_STD)


def flux() -> AutoencoderKL:
    """That of Flux, at its own size: four levels, 16 channels, 84 million weights."""
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=16,
        sample_size=1024,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def flux2() -> AutoencoderKLFlux2:
    """Four levels, as the image processor of the family assumes; latents of 4 channels, patched 2 x 2."""
    return AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def wan() -> AutoencoderKLWan:
    """Three levels: 4 times in space, 2 times in time."""
    return _wan([False, True], space=4, time=2)


def wan_full() -> AutoencoderKLWan:
    """Four levels: 8 times in space and 4 in time, for pipelines that count on them."""
    return _wan([False, True, True], space=8, time=4)


def _wan(halves_time: list[bool], *, space: int, time: int) -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1] * (len(halves_time) + 1),
        num_res_blocks=1,
        temperal_downsample=halves_time,
        scale_factor_spatial=space,
        scale_factor_temporal=time,
        latents_mean=_LATENTS_MEAN,
        latents_std=_LATENTS_STD,
    )


def qwen(channels: int = 3, latents: int = 4) -> AutoencoderKLQwenImage:
    """Four levels, for images of 3 channels or, with transparency, 4; `latents` is a multiple of 4."""
    return AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=latents,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        input_channels=channels,
        latents_mean=_LATENTS_MEAN * (latents // 4),
        latents_std=_LATENTS_STD * (latents // 4),
    )
