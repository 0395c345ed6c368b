"""Flux, Kontext and Flux 2."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    Flux3Transformer2DModel,
    FluxTransformer2DModel,
)
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    Qwen3VLForConditionalGeneration,
)

from triptych.tools.make_model import text, vaes
from triptych.tools.make_model.recipe import Component, Recipe, Size, image_defaults, size_ranges
from triptych.tools.make_model.text import TEXT_LENGTH, WIDTH


def flux(vae: Component, *, guidance_embeds: bool, pipeline: str = "FluxPipeline") -> Recipe:
    """Flux with a VAE, with guidance embedded as the larger original has it or without."""
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.tokenizer(start=True),
        "text_encoder": text.clip_text,
        "tokenizer_2": lambda: text.tokenizer(start=False),
        "text_encoder_2": text.t5,
        "transformer": lambda: FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            guidance_embeds=guidance_embeds,
            axes_dims_rope=(4, 6, 6),
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vae,
    }
    defaults = image_defaults(text=TEXT_LENGTH)
    if guidance_embeds:
        defaults["guidance_scale"] = 3.5
    return Recipe(pipeline, "text-to-image", components, defaults, size_ranges(8))


def mid() -> Recipe:
    """Flux with its own VAE, the text encoders of CLIP L and T5 Large, and a transformer of 600 million weights."""
    made = flux(vaes.flux, guidance_embeds=True)
    components = {
        **made.components,
        "text_encoder": lambda: text.clip_text(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        ),
        "text_encoder_2": lambda: text.t5(d_model=1024, d_kv=64, d_ff=2816, num_layers=24, num_heads=16),
        "transformer": lambda: FluxTransformer2DModel(
            in_channels=64,
            num_layers=4,
            num_single_layers=8,
            attention_head_dim=128,
            num_attention_heads=12,
            joint_attention_dim=1024,
            pooled_projection_dim=768,
            guidance_embeds=True,
        ),
    }
    defaults = {**made.defaults, **image_defaults(side=512, text=TEXT_LENGTH)}
    return replace(
        made,
        components=components,
        defaults=defaults,
        ranges=size_ranges(16, most=1024),
        dtype=torch.bfloat16,
        size=Size.MID,
    )


def full() -> Recipe:
    """Flux at the shapes of FLUX.1-dev: 34 GB in bfloat16, but for the vocabularies of the tokenizers."""
    made = flux(vaes.flux, guidance_embeds=True)
    components = {
        **made.components,
        "tokenizer": lambda: text.tokenizer(start=True, length=77),
        "text_encoder": lambda: text.clip_text(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=77,
        ),
        "tokenizer_2": lambda: text.tokenizer(start=False, length=512),
        "text_encoder_2": lambda: text.t5(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
        ),
        "transformer": lambda: FluxTransformer2DModel(guidance_embeds=True),
    }
    return replace(
        made,
        components=components,
        defaults={**made.defaults, **image_defaults(side=1024, steps=28, text=512)},
        ranges=size_ranges(16, most=2048, text=512),
        dtype=torch.bfloat16,
        size=Size.FULL,
    )


def kontext() -> Recipe:
    """Flux that changes an image."""
    made = flux(vaes.kl, guidance_embeds=True, pipeline="FluxKontextPipeline")
    return Recipe(made.pipeline, "image_conditioned", made.components, made.defaults, made.ranges)


def flux2() -> Recipe:
    """Flux 2, whose text encoder is Mistral 3."""
    components = _flux2(text_encoder=_mistral, layers=3, guidance_embeds=True)
    defaults = image_defaults(text=512, guidance_scale=4.0)
    return Recipe("Flux2Pipeline", "text-to-image", components, defaults, size_ranges(16, text=1024))


def klein(*, distilled: bool) -> Recipe:
    """Flux 2 Klein, whose text encoder is Qwen 3: the distilled one, or its base."""
    # It reads the states of layers 9, 18 and 27.
    components = _flux2(lambda: text.qwen3(Qwen3ForCausalLM, layers=28), layers=3, guidance_embeds=False)
    defaults = image_defaults(text=128)
    settings: dict[str, object] = {"is_distilled": distilled}
    return Recipe("Flux2KleinPipeline", "text-to-image", components, defaults, size_ranges(16), settings)


def _flux2(text_encoder: Component, layers: int, *, guidance_embeds: bool) -> dict[str, Component | None]:
    return {
        "tokenizer": chat,
        "text_encoder": text_encoder,
        "transformer": lambda: Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=layers * WIDTH,
            timestep_guidance_channels=WIDTH,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance_embeds,
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vaes.flux2,
    }


def flux3(*, distilled: bool) -> Recipe:
    """Flux 3, whose text encoder is Qwen 3 VL, or the distilled one."""
    components: dict[str, Component | None] = {
        "prompt_upsampler": text.qwen3_5_vl,
        "prompt_upsampler_processor": text.qwen3_vl_processor,
        "tokenizer": text.qwen3_vl_processor,
        # It reads the states of eight layers, the last of them the 32nd.
        "text_encoder": lambda: text.qwen3_vl(Qwen3VLForConditionalGeneration, layers=32),
        "transformer": lambda: Flux3Transformer2DModel(
            in_channels=16,
            cond_in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8 * WIDTH,
            timestep_channels=WIDTH,
            axes_dims_rope=(4, 4, 4, 4),
            flow_map=distilled,
        ),
        "vae": vaes.flux2,
    }
    name = "Flux3DistilledModularPipeline" if distilled else "Flux3ModularPipeline"
    return Recipe(name, "text-to-image", components, image_defaults(text=512), size_ranges(16, text=1024))


def chat() -> PreTrainedTokenizerFast:
    """The tokenizer of a language model."""
    return text.chat_tokenizer()


def _mistral() -> Mistral3ForConditionalGeneration:
    # It reads the states of layers 10, 20 and 30.
    config = Mistral3Config(
        text_config={"model_type": "mistral", **text.decoder_config(num_hidden_layers=31, head_dim=16)},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "head_dim": 16,
            "image_size": 64,
            "patch_size": 16,
        },
    )
    return Mistral3ForConditionalGeneration(config)
