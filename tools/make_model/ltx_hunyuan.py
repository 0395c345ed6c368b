"""LTX, LTX-2 with its sound, and HunyuanVideo 1.5."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import (
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Transformer3DModel,
    LTX2VideoDiffusionDecoderModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2DurationHead, LTX2TextConnectors, LTX2Vocoder
from transformers import (
    ByT5Tokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessorPil,
)

from triptych.tools.make_model import text
from triptych.tools.make_model.recipe import Component, Recipe, image_defaults, size_ranges
from triptych.tools.make_model.text import TEXT_LENGTH, WIDTH


def ltx() -> Recipe:
    """LTX of the first generation, without sound."""
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.tokenizer(start=False),
        "text_encoder": text.t5,
        "transformer": lambda: LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=WIDTH,
            num_layers=2,
            caption_channels=WIDTH,
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": lambda: AutoencoderKLLTXVideo(
            latent_channels=8,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            encoder_causal=True,
            decoder_causal=False,
        ),
    }
    defaults = {**image_defaults(text=TEXT_LENGTH), "num_frames": 9, "guidance_scale": 3.0}
    return Recipe("LTXPipeline", "text-to-video", components, defaults, {**size_ranges(32), "num_frames": [1, 33]})


def ltx2() -> Recipe:
    """LTX-2: video and its sound are denoised together."""
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.chat_tokenizer(),
        "text_encoder": _gemma,
        "connectors": lambda: LTX2TextConnectors(
            caption_channels=WIDTH,
            text_proj_in_factor=3,  # The states of two layers and of the embedding.
            video_connector_num_attention_heads=2,
            video_connector_attention_head_dim=16,
            video_connector_num_layers=1,
            video_connector_num_learnable_registers=None,
            audio_connector_num_attention_heads=2,
            audio_connector_attention_head_dim=16,
            audio_connector_num_layers=1,
            audio_connector_num_learnable_registers=None,
            connector_rope_base_seq_len=32,
            rope_type="split",
        ),
        "transformer": lambda: LTX2VideoTransformer3DModel(**ltx2_transformer()),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": _ltx2_vae,
        "audio_vae": _ltx2_audio_vae,
        "vocoder": lambda: LTX2Vocoder(
            in_channels=2 * 16,  # Two channels of sound, 16 bins of pitch each.
            hidden_channels=16,
            out_channels=2,
            upsample_kernel_sizes=[4, 4],
            upsample_factors=[2, 2],
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3, 5]],
            output_sampling_rate=16000,
        ),
        "prompt_enhancer": None,
        "processor": None,
        "duration_head": None,
    }
    defaults = {**image_defaults(text=TEXT_LENGTH), "num_frames": 9, "frame_rate": 25.0}
    return Recipe("LTX2Pipeline", "text-to-video", components, defaults, {**size_ranges(32), "num_frames": [1, 33]})


def ltx25() -> Recipe:
    """LTX-2.5: the parts of LTX-2, a decoder that denoises, and a head that says how long a shot is."""
    made = ltx2()
    components: dict[str, Component | None] = {
        **made.components,
        "duration_head": lambda: LTX2DurationHead(
            video_cross_attention_dim=WIDTH,
            audio_cross_attention_dim=WIDTH,
            pooler_hidden_dim=16,
            num_pooler_heads=2,
            mlp_hidden_dim=16,
        ),
        "diffusion_decoder": _ltx25_decoder,
    }
    defaults = {**made.defaults, "max_seconds": 0.6, "min_seconds": 0.3}
    del defaults["num_frames"]
    return replace(made, pipeline="LTX25ModularPipeline", components=components, defaults=defaults)


def _ltx25_decoder() -> LTX2VideoDiffusionDecoderModel:
    decoder = LTX2VideoDiffusionDecoderModel(
        latent_channels=4,
        decoder_head_dim=8,
        decoder_stage_channels=(64, 32, 16, 16, 8),
        decoder_stage_depths=(1, 1, 1, 1, 1),
        # No wider than the latents of the smallest image are.
        decoder_stage_kernels=((3, 1, 1), (3, 1, 1), (3, 3, 3), (3, 3, 3)),
        decoder_stage5_kernel=(3, 3, 3),
        decoder_t_emb_dim=16,
    )
    _set_statistics(decoder, 4)
    return decoder


def echo() -> Recipe:
    """Echo: the parts of LTX-2, and what it has seen and said before."""
    made = ltx2()
    return replace(made, pipeline="EchoModularPipeline", task="")


def ltx2_transformer() -> dict[str, Any]:
    """What the transformer of `ltx2` is made with."""
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "cross_attention_dim": WIDTH,
        "audio_in_channels": 8,
        "audio_out_channels": 8,
        "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 8,
        "audio_cross_attention_dim": 16,
        "num_layers": 2,
        "caption_channels": WIDTH,
        "rope_type": "split",
        "rope_double_precision": False,
        # For the guidance that runs without some of the blocks.
        "perturbed_attn": True,
    }


def _ltx2_vae() -> AutoencoderKLLTX2Video:
    vae = AutoencoderKLLTX2Video(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 16, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )
    _set_statistics(vae, 4)
    return vae


def _ltx2_audio_vae() -> AutoencoderKLLTX2Audio:
    vae = AutoencoderKLLTX2Audio(
        base_channels=8,  # As many as the audio transformer has channels.
        ch_mult=(1, 2, 4),
        num_res_blocks=1,
        in_channels=2,
        resolution=32,
        latent_channels=2,
        mel_bins=16,
    )
    _set_statistics(vae, len(vae.latents_mean))
    return vae


def _set_statistics(vae: Any, channels: int) -> None:
    # These are buffers: they are in the weights file, not in the configuration.
    for index in range(channels):
        vae.latents_mean[index] = 0.1 * index - 0.2
        vae.latents_std[index] = 1.0 + 0.1 * index


def _gemma() -> Gemma3ForConditionalGeneration:
    config = Gemma3Config(
        text_config=text.decoder_config(head_dim=16, layer_types=["full_attention"] * 2),
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        },
        mm_tokens_per_image=4,
    )
    return Gemma3ForConditionalGeneration(config)


def hunyuan_video() -> Recipe:
    """HunyuanVideo 1.5, of text or of an image and text."""
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.chat_tokenizer(),
        "text_encoder": _qwen_text,
        "tokenizer_2": lambda: ByT5Tokenizer(),
        # The bytes of its tokenizer, and 128 numbers that are no text.
        "text_encoder_2": lambda: text.t5(vocab_size=384, pad_token_id=0, eos_token_id=1),
        "transformer": lambda: HunyuanVideo15Transformer3DModel(
            in_channels=2 * 4 + 1,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            image_embed_dim=WIDTH,
            rope_axes_dim=(4, 6, 6),
            target_size=16,
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=7.0),
        "vae": lambda: AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8, 8),
            layers_per_block=1,
        ),
        "image_encoder": lambda: text.siglip_vision(num_hidden_layers=2),
        "feature_extractor": lambda: SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    }
    defaults = {**image_defaults(), "num_frames": 5, "guidance_scale": 6.0}
    del defaults["max_sequence_length"]
    ranges = {"height": [16, 256, 16], "width": [16, 256, 16], "num_frames": [1, 33]}
    return Recipe("HunyuanVideo15Pipeline", "text-to-video", components, defaults, ranges)


def _qwen_text() -> Qwen2_5_VLTextModel:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    # It reads the states of the third layer from the end.
    config = text.decoder_config(num_hidden_layers=3, rope_parameters=rope, rope_scaling=rope)
    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**config))
