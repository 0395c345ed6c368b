"""Stable Diffusion XL and 3."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from triptych.tools.make_model import text, vaes
from triptych.tools.make_model.recipe import Component, Recipe, image_defaults, size_ranges
from triptych.tools.make_model.text import TEXT_LENGTH, WIDTH


def sdxl() -> Recipe:
    """A UNet with two text encoders, and a control net for the tasks that use one."""
    components: dict[str, Component | None] = {
        **_two_clips(first_projects=False),
        "unet": sdxl_unet,
        "controlnet": lambda: ControlNetModel(
            layers_per_block=1, conditioning_embedding_out_channels=(8, 16, 16), **_unet()
        ),
        "scheduler": lambda: EulerDiscreteScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading"
        ),
        "vae": lambda: vaes.kl(quant=True, shift=None),
        "image_encoder": lambda: text.clip_vision_projection(image_size=224, patch_size=32),
    }
    defaults = image_defaults(guidance_scale=7.5)
    del defaults["max_sequence_length"]
    ranges = {name: limits for name, limits in size_ranges(8).items() if name in defaults}
    settings: dict[str, object] = {"force_zeros_for_empty_prompt": True}
    files = {"ip_adapter/tiny.safetensors": _ip_adapter}
    return Recipe("StableDiffusionXLPipeline", "text-to-image", components, defaults, ranges, settings, files)


def sdxl_union() -> Recipe:
    """The same with a control net that knows several kinds of control."""
    made = sdxl()
    components: dict[str, Component | None] = {
        **made.components,
        "controlnet": lambda: ControlNetUnionModel(
            layers_per_block=1,
            conditioning_embedding_out_channels=(8, 16, 16),
            num_trans_channel=16,
            num_trans_head=2,
            num_proj_channel=16,
            **_unet(),
        ),
    }
    return replace(made, components=components)


def sd3(channels: int = 4) -> Recipe:
    """A transformer with three text encoders; `channels` are of the latents."""
    # The states of both CLIPs side by side are padded to the width of T5.
    components: dict[str, Component | None] = {
        **_two_clips(first_projects=True),
        "tokenizer_3": lambda: text.tokenizer(start=False),
        "text_encoder_3": lambda: text.t5(d_model=2 * WIDTH),
        "transformer": lambda: SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=channels,
            out_channels=channels,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=2 * WIDTH,
            caption_projection_dim=WIDTH,
            pooled_projection_dim=2 * WIDTH,
            pos_embed_max_size=32,
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": lambda: vaes.kl(latent_channels=channels),
    }
    defaults = image_defaults(text=TEXT_LENGTH, guidance_scale=7.0)
    return Recipe("StableDiffusion3Pipeline", "text-to-image", components, defaults, size_ranges(8))


def _two_clips(*, first_projects: bool) -> dict[str, Component | None]:
    return {
        "tokenizer": lambda: text.tokenizer(start=True),
        "text_encoder": lambda: text.clip_text(projection=first_projects),
        "tokenizer_2": lambda: text.tokenizer(start=True),
        "text_encoder_2": lambda: text.clip_text(projection=True),
    }


def sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    """The UNet of SDXL, with two levels."""
    made: dict[str, Any] = {
        "sample_size": 16,
        "layers_per_block": 1,
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        **_unet(),
    }
    return UNet2DConditionModel(**{**made, **changes})


def _ip_adapter() -> dict[str, torch.Tensor]:
    """An IP adapter as they are published: four tokens of an image, and where each layer looks at them."""
    wide = 2 * WIDTH
    made = {
        "image_proj.proj.weight": torch.randn(4 * wide, WIDTH),
        "image_proj.proj.bias": torch.randn(4 * wide),
        "image_proj.norm.weight": torch.ones(wide),
        "image_proj.norm.bias": torch.zeros(wide),
    }
    for number, name in enumerate(sdxl_unet().attn_processors):
        if name.endswith("attn2.processor"):
            for part in ("k", "v"):
                made[f"ip_adapter.{number}.to_{part}_ip.weight"] = torch.randn(WIDTH, wide)
    return made


def _unet() -> dict[str, Any]:
    return {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "block_out_channels": (16, 32),
        "norm_num_groups": 8,
        "attention_head_dim": (2, 2),
        "cross_attention_dim": 2 * WIDTH,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
    }
