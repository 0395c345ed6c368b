"""PixArt-Sigma, Sana, Chroma, CogVideoX, GLM-Image, Kandinsky 5 and Stable Diffusion 1.5 with a ControlNet.

Diffusers does not have them in blocks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffusers import (
    AutoencoderDC,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    ChromaTransformer2DModel,
    CogVideoXDPMScheduler,
    CogVideoXTransformer3DModel,
    ControlNetModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    GlmImageTransformer2DModel,
    Kandinsky5Transformer3DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    UNet2DConditionModel,
)
from transformers import (
    ByT5Tokenizer,
    Gemma2Config,
    Gemma2Model,
    GlmImageConfig,
    GlmImageForConditionalGeneration,
    GlmImageImageProcessorPil,
    GlmImageProcessor,
    PreTrainedTokenizerFast,
)

from triptych.tools.make_model import text, vaes
from triptych.tools.make_model.recipe import Component, Recipe, image_defaults, size_ranges
from triptych.tools.make_model.text import TEXT_LENGTH, VOCABULARY_SIZE, WIDTH


def pixart_transformer(layers: int = 2) -> PixArtTransformer2DModel:
    """That of PixArt, of some layers."""
    return PixArtTransformer2DModel(
        sample_size=32,
        num_layers=layers,
        patch_size=2,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=WIDTH,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=WIDTH,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
    )


def pixart() -> Recipe:
    """PixArt-Sigma."""
    components: dict[str, Component | None] = {
        **_t5(),
        "transformer": pixart_transformer,
        "scheduler": lambda: DPMSolverMultistepScheduler(),
        "vae": vaes.kl,
    }
    defaults = image_defaults(guidance_scale=4.5, use_resolution_binning=False, clean_caption=False)
    return _classic("PixArtSigmaPipeline", "text-to-image", components, defaults, size_ranges(16))


def sana() -> Recipe:
    """Sana, whose VAE is its own and whose text encoder is Gemma 2."""
    blocks: dict[str, Any] = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock", "EfficientViTBlock"),
            "block_out_channels": (8, 16),
            "layers_per_block": (1, 1),
            "qkv_multiscales": ((), (5,)),
        }.items()
    }
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.tokenizer(start=False),
        "text_encoder": lambda: Gemma2Model(
            Gemma2Config(
                vocab_size=VOCABULARY_SIZE,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                query_pre_attn_scalar=16,
                pad_token_id=text.PAD,
            )
        ),
        "transformer": lambda: SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=16,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=WIDTH,
            caption_channels=WIDTH,
            sample_size=16,
        ),
        "scheduler": lambda: DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        "vae": lambda: AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41,
            **blocks,
        ),
    }
    defaults = image_defaults(guidance_scale=4.5, use_resolution_binning=False)
    return _classic("SanaPipeline", "text-to-image", components, defaults, size_ranges(32))


def chroma() -> Recipe:
    """Chroma."""
    components: dict[str, Component | None] = {
        **_t5(),
        "transformer": lambda: ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=WIDTH,
            approximator_layers=1,
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "vae": vaes.kl,
    }
    return _classic("ChromaPipeline", "text-to-image", components, image_defaults(guidance_scale=5.0), size_ranges(16))


def cogvideox() -> Recipe:
    """CogVideoX, with rotary embeddings as the larger original has them."""
    components: dict[str, Component | None] = {
        **_t5(),
        "transformer": lambda: CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=WIDTH,
            num_layers=1,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            temporal_compression_ratio=2,
            max_text_seq_length=TEXT_LENGTH,
            use_rotary_positional_embeddings=True,
        ),
        "scheduler": lambda: CogVideoXDPMScheduler(prediction_type="v_prediction"),
        "vae": lambda: AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 3,
            up_block_types=("CogVideoXUpBlock3D",) * 3,
            block_out_channels=(8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=4,
            temporal_compression_ratio=2,
            sample_height=32,
            sample_width=32,
        ),
    }
    defaults = image_defaults(32, num_frames=5, guidance_scale=6.0)
    return _classic("CogVideoXPipeline", "text-to-video", components, defaults, size_ranges(8))


def glm_image() -> Recipe:
    """GLM-Image: a language model writes what a transformer then paints."""
    components: dict[str, Component | None] = {
        "tokenizer": lambda: ByT5Tokenizer(),
        "processor": lambda: GlmImageProcessor(
            image_processor=GlmImageImageProcessorPil(patch_size=16, merge_size=1),
            tokenizer=_glm_tokenizer(),
            chat_template=text.CHAT,
        ),
        # The bytes of its tokenizer, and 128 numbers that are no text.
        "text_encoder": lambda: text.t5(vocab_size=384, pad_token_id=0, eos_token_id=1),
        "vision_language_encoder": _glm,
        "vae": vaes.kl_full,
        "transformer": lambda: GlmImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=WIDTH,
            condition_dim=16,
            prior_vq_quantizer_codebook_size=_CODES,
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    }
    defaults = image_defaults(guidance_scale=1.5)
    return _classic("GlmImagePipeline", "text-to-image", components, defaults, size_ranges(32))


def kandinsky5_transformer(**changes: Any) -> Kandinsky5Transformer3DModel:
    """That of Kandinsky 5."""
    return Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=WIDTH,
        model_dim=WIDTH,
        ff_dim=2 * WIDTH,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(4, 6, 6),
        **changes,
    )


def kandinsky5() -> Recipe:
    """Kandinsky 5, which makes videos; it has the VAE of HunyuanVideo."""
    components: dict[str, Component | None] = {
        "transformer": kandinsky5_transformer,
        "vae": lambda: AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        "text_encoder": text.qwen2_5_vl,
        # Its own is a processor, of which just the tokenizer is used, and which needs torchvision.
        "tokenizer": lambda: text.chat_tokenizer(),
        "text_encoder_2": lambda: text.clip_text(max_position_embeddings=77),
        "tokenizer_2": lambda: text.tokenizer(start=True),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
    }
    # A text stands after instructions of which each byte is a token.
    defaults = {**image_defaults(32, text=1024, guidance_scale=5.0), "num_frames": 5}
    return _classic("Kandinsky5T2VPipeline", "text-to-video", components, defaults, size_ranges(16, text=1024))


def sd_controlnet() -> Recipe:
    """Stable Diffusion 1.5 that follows the lines of an image."""
    net = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTH,
    }
    components: dict[str, Component | None] = {
        "vae": lambda: vaes.kl(quant=True, shift=None),
        "text_encoder": lambda: text.clip_text(max_position_embeddings=77),
        "tokenizer": lambda: text.tokenizer(start=True),
        "unet": lambda: UNet2DConditionModel(sample_size=16, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **net),
        "controlnet": lambda: ControlNetModel(conditioning_embedding_out_channels=(8, 16, 16), **net),
        "scheduler": lambda: DDIMScheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
    }
    defaults = image_defaults(guidance_scale=7.5)
    del defaults["max_sequence_length"]
    ranges = {name: limits for name, limits in size_ranges(8).items() if name in defaults}
    settings: dict[str, object] = {"requires_safety_checker": False}
    return _classic("StableDiffusionControlNetPipeline", "", components, defaults, ranges, settings)


_CODES = 64
_GLM_TOKENS = {
    "image_token": "<|image_pad|>",
    "grid_bos_token": "<sop>",
    "grid_eos_token": "<eop>",
    "boi_token": "<|vision_start|>",
    "eoi_token": "<|vision_end|>",
    "im_start_token": "<|im_start|>",
    "im_end_token": "<|im_end|>",
}


def _classic(*recipe: Any) -> Recipe:
    """A recipe whose layers are all random: some of these classes begin with zeros."""
    return replace(Recipe(*recipe), randomise_zero_layers=True)


def _glm_tokenizer() -> PreTrainedTokenizerFast:
    return text.chat_tokenizer(extra_special_tokens=_GLM_TOKENS)


def _glm() -> GlmImageForConditionalGeneration:
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_heads": 2,
        "image_size": 64,
    }
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    number = _glm_tokenizer().convert_tokens_to_ids
    language = text.decoder_config(
        vocab_size=VOCABULARY_SIZE + len(_GLM_TOKENS),
        vision_vocab_size=_CODES,
        rope_parameters=rope,
        # As in the original no code of an image: it writes as many as it is asked for.
        eos_token_id=number("<|vision_end|>"),
        # Weights that are large enough for what it writes to depend on what it reads.
        initializer_range=0.5,
    )
    config = GlmImageConfig(
        text_config=language,
        vision_config=vision,
        vq_config={"embed_dim": 16, "num_embeddings": _CODES, "latent_channels": WIDTH},
        image_token_id=number("<|image_pad|>"),
        image_start_token_id=number("<|vision_start|>"),
        image_end_token_id=number("<|vision_end|>"),
    )
    return GlmImageForConditionalGeneration(config)


def _t5() -> dict[str, Component | None]:
    return {"tokenizer": lambda: text.tokenizer(start=False), "text_encoder": text.t5}
