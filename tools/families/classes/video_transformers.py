"""Mochi, Allegro, Latte, EasyAnimate, Kandinsky 5 and 6, Motif and Cosmos."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AllegroTransformer3DModel,
    AutoencoderKLAllegro,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    DDIMScheduler,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    LatteTransformer3DModel,
    MochiTransformer3DModel,
    MotifVideoTransformer3DModel,
)
from transformers import (
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipImageProcessorPil,
    T5Gemma2EncoderConfig,
    T5Gemma2TextConfig,
)
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

from triptych.tools.families.cases import PROMPT, SIDE, input_image
from triptych.tools.families.classes import Sample
from triptych.tools.make_model import classic_pipelines, cosmos, text, vaes
from triptych.tools.make_model.recipe import Component
from triptych.tools.make_model.text import TEXT_LENGTH, VOCABULARY_SIZE, WIDTH

_TEXT: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "grey", "num_inference_steps": 2}
_VIDEO: dict[str, Any] = {**_TEXT, "height": 32, "width": 32, "num_frames": 5}
_SHORT: dict[str, Any] = {**_VIDEO, "max_sequence_length": TEXT_LENGTH}
# The instructions around a prompt are some hundreds of bytes, each a token.
_LONG: dict[str, Any] = {**_VIDEO, "max_sequence_length": 1024}
_GUARDED = ("cosmos_guardrail",)


def samples() -> list[Sample]:
    """Those of each."""
    image = {"image": input_image()}
    return [
        _mochi("MochiPipeline"),
        _allegro("AllegroPipeline"),
        _latte("LattePipeline"),
        Sample("EasyAnimatePipeline", _easy(), _VIDEO),
        Sample("EasyAnimateControlPipeline", _easy(in_channels=8), {**_VIDEO, "control_video": _frames(5)}),
        Sample(
            "EasyAnimateInpaintPipeline",
            _easy(in_channels=3 * 4, resize_inpaint_mask_directly=False),
            {**_VIDEO, "video": _frames(5), "mask_video": _masks(5)},
        ),
        Sample("Kandinsky5T2VPipeline", classic_pipelines.kandinsky5().components, _LONG),
        Sample("Kandinsky5I2VPipeline", _kandinsky5(visual_cond=True), {**_LONG, **image, "num_frames": 17}),
        Sample(
            "Kandinsky5T2IPipeline",
            {**_kandinsky5(), "vae": lambda: vaes.kl(levels=4)},
            {**_TEXT, "height": SIDE, "width": SIDE, "max_sequence_length": 1024},
        ),
        Sample(
            "Kandinsky5I2IPipeline",
            {**_kandinsky5(visual_cond=True), "vae": lambda: vaes.kl(levels=4)},
            {**_TEXT, "height": SIDE, "width": SIDE, "max_sequence_length": 1024, **image},
        ),
        Sample("MotifVideoPipeline", {**_motif(), "feature_extractor": None}, _SHORT),
        Sample("MotifVideoImage2VideoPipeline", _motif(), {**_SHORT, **image}),
        Sample(
            "Cosmos3OmniPipeline",
            {**cosmos.omni().components, "enable_safety_checker": False},
            {**_VIDEO, "use_system_prompt": False},
        ),
        *(
            Sample(f"{name}Pipeline", needs=_GUARDED)
            for name in (
                "CosmosTextToWorld",
                "CosmosVideoToWorld",
                "Cosmos2TextToImage",
                "Cosmos2VideoToWorld",
                "Cosmos2_5_PredictBase",
                "Cosmos2_5_Transfer",
            )
        ),
    ]


def _frames(count: int) -> torch.Tensor:
    return torch.linspace(0, 1, 3 * count * 32 * 32).reshape(1, 3, count, 32, 32)


def _masks(count: int) -> torch.Tensor:
    return (torch.linspace(0, 255, count * 32 * 32).reshape(1, 1, count, 32, 32) > 100) * 255.0


def _reading(encoder: Component = text.t5) -> dict[str, Component | None]:
    return {
        "tokenizer": lambda: text.tokenizer(start=False),
        "text_encoder": encoder,
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
    }


def _mochi(name: str) -> Sample:
    components = {
        **_reading(),
        "transformer": lambda: MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=WIDTH,
            time_embed_dim=4,
            max_sequence_length=TEXT_LENGTH,
        ),
        "vae": lambda: AutoencoderKLMochi(
            latent_channels=12,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(),
    }
    return Sample(name, components, {**_SHORT, "num_frames": 7})


def _allegro(name: str) -> Sample:
    components = {
        **_reading(),
        "scheduler": lambda: DDIMScheduler(),
        "transformer": lambda: AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            cross_attention_dim=24,
            sample_width=8,
            sample_height=8,
            sample_frames=8,
            caption_channels=WIDTH,
        ),
        "vae": lambda: AutoencoderKLAllegro(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("AllegroDownBlock3D",) * 4,
            up_block_types=("AllegroUpBlock3D",) * 4,
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
            sample_size=128,
        ),
    }
    # It decodes only in tiles, and nothing that is smaller than one.
    large = {"height": 128, "width": 128, "num_frames": 24, "vae_tiling": True}
    return Sample(name, components, {**_SHORT, **large, "clean_caption": False})


def _latte(name: str) -> Sample:
    components = {
        **_reading(),
        "scheduler": lambda: DDIMScheduler(),
        "transformer": lambda: LatteTransformer3DModel(
            sample_size=8,
            video_length=3,
            num_layers=1,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=WIDTH,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
        ),
        "vae": lambda: vaes.kl(shift=None),
    }
    inputs = {**_TEXT, "height": 32, "width": 32, "video_length": 3, "clean_caption": False}
    return Sample(name, components, inputs)


def _easy(**changes: Any) -> dict[str, Component | None]:
    return {
        "text_encoder": _qwen2_vl,
        "tokenizer": text.chat_tokenizer,
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
        "transformer": lambda: EasyAnimateTransformer3DModel(
            **{
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "in_channels": 4,
                "out_channels": 4,
                "time_embed_dim": 8,
                "text_embed_dim": WIDTH,
                "num_layers": 1,
                "sample_width": 16,
                "sample_height": 16,
                "patch_size": 2,
                **changes,
            }
        ),
        "vae": lambda: AutoencoderKLMagvit(
            block_out_channels=(8, 8, 8, 8),
            down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
            up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            spatial_group_norm=False,
        ),
    }


def _qwen2_vl() -> Qwen2VLForConditionalGeneration:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    eyes = {"depth": 1, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=text.decoder_config(rope_parameters=rope, rope_scaling=rope), vision_config=eyes)
    return Qwen2VLForConditionalGeneration(config)


def _kandinsky5(**changes: Any) -> dict[str, Component | None]:
    return {
        **classic_pipelines.kandinsky5().components,
        "transformer": lambda: classic_pipelines.kandinsky5_transformer(**changes),
    }


def _motif() -> dict[str, Component | None]:
    return {
        **_reading(_t5_gemma2),
        "transformer": lambda: MotifVideoTransformer3DModel(
            in_channels=2 * 4 + 1,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=1,
            patch_size=2,
            patch_size_t=1,
            text_embed_dim=WIDTH,
            image_embed_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
        ),
        "vae": vaes.wan_full,
        "guider": lambda: AdaptiveProjectedGuidance(),
        "feature_extractor": lambda: SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    }


def _t5_gemma2() -> T5Gemma2Encoder:
    words = T5Gemma2TextConfig(**text.decoder_config(vocab_size=VOCABULARY_SIZE, head_dim=16, dropout_rate=0.0))
    eyes = text.siglip_vision_config()
    return T5Gemma2Encoder(T5Gemma2EncoderConfig(text_config=words, vision_config=eyes))
