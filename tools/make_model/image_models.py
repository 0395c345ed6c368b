"""Z-Image, Krea 2, Anima and ERNIE-Image: one transformer, one language model that reads the prompt."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AnimaTextConditioner,
    CosmosTransformer3DModel,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Krea2Transformer2DModel,
    ZImageTransformer2DModel,
)
from transformers import Mistral3Config, Mistral3Model, Qwen3Model, Qwen3VLModel

from triptych.tools.make_model import text, vaes
from triptych.tools.make_model.recipe import Component, Recipe, image_defaults, size_ranges
from triptych.tools.make_model.text import TEXT_LENGTH, VOCABULARY_SIZE, WIDTH


def z_image_transformer(**changes: Any) -> ZImageTransformer2DModel:
    """That of Z-Image."""
    return ZImageTransformer2DModel(
        in_channels=4,
        dim=WIDTH,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[512, 64, 64],
        **changes,
    )


def z_image() -> Recipe:
    """Z-Image; text and image are one sequence."""
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.chat_tokenizer(),
        "text_encoder": lambda: text.qwen3(Qwen3Model),
        "transformer": z_image_transformer,
        "scheduler": _scheduler,
        "vae": vaes.kl,
    }
    return Recipe("ZImagePipeline", "text-to-image", components, image_defaults(text=128), size_ranges(16))


def krea2(*, turbo: bool) -> Recipe:
    """Krea 2, or the distilled one."""
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.chat_tokenizer(),
        # It reads the states of twelve layers, the last of them the 35th.
        "text_encoder": lambda: text.qwen3_vl(Qwen3VLModel, layers=36),
        "transformer": lambda: Krea2Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=2 * WIDTH,
            timestep_embed_dim=WIDTH,
            text_hidden_dim=WIDTH,
            text_num_attention_heads=2,
            text_num_key_value_heads=2,
            text_intermediate_size=2 * WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
        "scheduler": _scheduler,
        "vae": vaes.qwen,
    }
    settings: dict[str, object] = {"is_distilled": True} if turbo else {}
    return Recipe(
        "Krea2Pipeline", "text-to-image", components, image_defaults(text=512), size_ranges(16, text=1024), settings
    )


def anima() -> Recipe:
    """Anima, whose text goes through two tokenizers."""
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.chat_tokenizer(),
        "t5_tokenizer": lambda: text.tokenizer(start=False),
        "text_encoder": lambda: text.qwen3(Qwen3Model),
        "text_conditioner": lambda: AnimaTextConditioner(
            source_dim=WIDTH,
            target_dim=WIDTH,
            model_dim=WIDTH,
            num_layers=1,
            num_attention_heads=2,
            target_vocab_size=VOCABULARY_SIZE,
            min_sequence_length=TEXT_LENGTH,
        ),
        "transformer": lambda: CosmosTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            text_embed_dim=WIDTH,
            adaln_lora_dim=4,
            max_size=(4, 64, 64),
            extra_pos_embed_type=None,
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vaes.qwen,
    }
    return Recipe(
        "AnimaModularPipeline", "text-to-image", components, image_defaults(text=TEXT_LENGTH), size_ranges(16)
    )


def ernie() -> Recipe:
    """ERNIE-Image, without the model that rewrites prompts."""
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.chat_tokenizer(),
        "text_encoder": lambda: Mistral3Model(
            Mistral3Config(
                text_config={"model_type": "mistral", **text.decoder_config(head_dim=16)},
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
        ),
        "transformer": lambda: ErnieImageTransformer2DModel(
            hidden_size=WIDTH,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=2 * WIDTH,
            in_channels=16,
            out_channels=16,
            text_in_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        "vae": vaes.flux2,
        "pe": None,
        "pe_tokenizer": None,
    }
    defaults = image_defaults(guidance_scale=4.0)
    del defaults["max_sequence_length"]
    ranges = {name: limits for name, limits in size_ranges(16).items() if name in defaults}
    return Recipe("ErnieImagePipeline", "text-to-image", components, defaults, ranges)


def _scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
