"""Qwen-Image and what was made of it: editing, several images, layers."""

from __future__ import annotations

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageControlNetModel, QwenImageTransformer2DModel

from triptych.tools.make_model import text, vaes
from triptych.tools.make_model.recipe import Component, Recipe, image_defaults, size_ranges
from triptych.tools.make_model.text import WIDTH


def qwenimage() -> Recipe:
    """Images of text, with a control net for the tasks that use one."""
    components = {**_components(), "tokenizer": text.chat_tokenizer, "controlnet": _controlnet}
    return Recipe("QwenImagePipeline", "text-to-image", components, _defaults(), size_ranges(16, text=1024))


def edit() -> Recipe:
    """Changes an image."""
    components = {**_components(), "processor": text.qwen2_vl_processor, "tokenizer": text.chat_tokenizer}
    return Recipe("QwenImageEditPipeline", "image_conditioned", components, _defaults(), size_ranges(16, text=1024))


def edit_plus() -> Recipe:
    """Changes several images into one."""
    components = {**_components(), "processor": text.qwen2_vl_processor, "tokenizer": text.chat_tokenizer}
    return Recipe("QwenImageEditPlusPipeline", "", components, _defaults(), size_ranges(16, text=1024))


def layered() -> Recipe:
    """Takes an image apart into transparent layers."""
    changes = {"use_layer3d_rope": True, "use_additional_t_cond": True}
    components = {
        **_components(changes, channels=4),
        "processor": text.qwen2_vl_processor,
        "tokenizer": text.chat_tokenizer,
    }
    return Recipe("QwenImageLayeredPipeline", "", components, _defaults(), size_ranges(16, text=1024))


def _defaults() -> dict[str, float]:
    return image_defaults(text=512, guidance_scale=4.0)


def _components(changes: dict[str, Any] | None = None, channels: int = 3) -> dict[str, Component | None]:
    return {
        "text_encoder": text.qwen2_5_vl,
        "transformer": lambda: QwenImageTransformer2DModel(**_transformer(), **(changes or {})),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": lambda: vaes.qwen(channels),
    }


def _transformer() -> dict[str, Any]:
    return {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }


def _controlnet() -> QwenImageControlNetModel:
    return QwenImageControlNetModel(**{**_transformer(), "num_layers": 1})
