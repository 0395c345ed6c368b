"""Ideogram 4 and Qwen-Image 2.1: images of a transformer that reads with Qwen 3 VL."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    Ideogram4Transformer2DModel,
    QwenImage21Transformer2DModel,
)
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLModel

from triptych.tools.make_model import text, vaes
from triptych.tools.make_model.recipe import Component, Recipe, image_defaults, size_ranges
from triptych.tools.make_model.text import WIDTH


def ideogram4() -> Recipe:
    """Ideogram 4: two transformers, one that has read the prompt and one that has not."""
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.chat_tokenizer(),
        # It reads the states of thirteen layers, the last of them the 35th.
        "text_encoder": lambda: text.qwen3_vl(Qwen3VLModel, layers=36),
        "transformer": _ideogram4_transformer,
        "unconditional_transformer": _ideogram4_transformer,
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(),
        "vae": vaes.flux2,
        "prompt_enhancer_head": None,
    }
    return Recipe("Ideogram4Pipeline", "text-to-image", components, image_defaults(text=128), size_ranges(16))


def _ideogram4_transformer() -> Ideogram4Transformer2DModel:
    return Ideogram4Transformer2DModel(
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        intermediate_size=2 * WIDTH,
        adaln_dim=WIDTH,
        llm_features_dim=13 * WIDTH,
        mrope_section=(4, 2, 2),
    )


def qwenimage21(*, turbo: bool) -> Recipe:
    """Qwen-Image 2.1, or the distilled one, whose steps are in its index."""
    components: dict[str, Component | None] = {
        "processor": text.qwen3_vl_processor,
        "text_encoder": lambda: text.qwen3_vl(Qwen3VLForConditionalGeneration),
        "transformer": lambda: QwenImage21Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": lambda: AutoencoderKLQwenImage21(
            base_dim=8,
            decoder_base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 1.2, 0.8, 1.1],
        ),
    }
    defaults = image_defaults()
    del defaults["max_sequence_length"]
    ranges = {name: limits for name, limits in size_ranges(16).items() if name in defaults}
    settings: dict[str, object] = {"sample_sigmas": [1.0, 0.7, 0.4]} if turbo else {}
    pipeline = "QwenImage21TurboModularPipeline" if turbo else "QwenImage21ModularPipeline"
    return Recipe(pipeline, "text-to-image", components, defaults, ranges, settings)
