"""HunyuanDiT, HunyuanImage and HunyuanVideo."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AdaptiveProjectedMixGuidance,
    AutoencoderKLHunyuanImage,
    AutoencoderKLHunyuanImageRefiner,
    AutoencoderKLHunyuanVideo,
    ClassifierFreeGuidance,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    HunyuanImageTransformer2DModel,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoTransformer3DModel,
)
from transformers import (
    BertConfig,
    BertModel,
    ByT5Tokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from triptych.tools.families.cases import PROMPT, SIDE, input_image
from triptych.tools.families.classes import Sample
from triptych.tools.make_model import ltx_hunyuan, text, vaes
from triptych.tools.make_model.recipe import Component
from triptych.tools.make_model.text import VISION_VOCABULARY_SIZE, VOCABULARY_SIZE, WIDTH

_DIT: dict[str, Any] = {
    "prompt": PROMPT,
    "negative_prompt": "grey",
    "height": SIDE,
    "width": SIDE,
    "num_inference_steps": 2,
    "use_resolution_binning": False,
}
_DIT_SIZES: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 3,
    "in_channels": 4,
    "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": WIDTH,
    "pooled_projection_dim": 16,
    "hidden_size": 24,
}
_IMAGE: dict[str, Any] = {"prompt": PROMPT, "height": SIDE, "width": SIDE, "num_inference_steps": 2}
# The instructions around a prompt are some 500 bytes, each a token.
_VIDEO: dict[str, Any] = {
    "prompt": PROMPT,
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "num_inference_steps": 2,
    "max_sequence_length": 640,
}
_VIDEO15: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "grey", "num_frames": 5, "num_inference_steps": 2}


def samples() -> list[Sample]:
    """Those of all generations."""
    seen = {"image": input_image()}
    return [
        _dit("HunyuanDiTPipeline", _DIT),
        _dit("HunyuanDiTPAGPipeline", {**_DIT, "pag_scale": 2.0}),
        _dit("HunyuanDiTControlNetPipeline", {**_DIT, "control_image": input_image()}, controlnet=_dit_net),
        Sample(
            "HunyuanImagePipeline",
            {
                **_image(),
                "guider": lambda: AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
                "ocr_guider": lambda: AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3),
            },
            {**_IMAGE, "prompt": 'a red sign that says "open"'},
        ),
        Sample("HunyuanImageRefinerPipeline", _refiner(), {**_IMAGE, **seen}),
        Sample(
            "HunyuanVideoPipeline",
            _video(lambda: HunyuanVideoTransformer3DModel(**_transformer(guidance_embeds=True))),
            _VIDEO,
        ),
        Sample(
            "HunyuanSkyreelsImageToVideoPipeline",
            _video(lambda: HunyuanVideoTransformer3DModel(**_transformer(in_channels=8, guidance_embeds=True))),
            {**_VIDEO, **seen},
        ),
        _video_of_picture("HunyuanVideoImageToVideoPipeline"),
        _framepack("HunyuanVideoFramepackPipeline"),
        Sample("HunyuanVideo15Pipeline", _video15(), {**_VIDEO15, "height": 32, "width": 32}),
        Sample(
            "HunyuanVideo15ImageToVideoPipeline",
            {**ltx_hunyuan.hunyuan_video().components, "guider": lambda: ClassifierFreeGuidance(guidance_scale=4.0)},
            {**_VIDEO15, **seen},
        ),
    ]


def _dit(name: str, inputs: dict[str, Any], **more: Component) -> Sample:
    components: dict[str, Component | None] = {
        # Its positions count on images 8 times as large as latents.
        "vae": lambda: vaes.kl(levels=4, quant=True, shift=None),
        "text_encoder": lambda: BertModel(
            BertConfig(
                vocab_size=VOCABULARY_SIZE,
                hidden_size=WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=2 * WIDTH,
                max_position_embeddings=128,
                pad_token_id=text.PAD,
            )
        ),
        "tokenizer": lambda: text.tokenizer(start=True, length=77),
        "text_encoder_2": text.t5,
        "tokenizer_2": lambda: text.tokenizer(start=False, length=256),
        "transformer": lambda: HunyuanDiT2DModel(num_layers=4, **_DIT_SIZES),
        "scheduler": lambda: DDPMScheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return Sample(name, {**components, **more, "requires_safety_checker": False}, inputs)


def _dit_net() -> HunyuanDiT2DControlNetModel:
    return HunyuanDiT2DControlNetModel(transformer_num_layers=4, **_DIT_SIZES)


def _image() -> dict[str, Component | None]:
    return {
        **_reading(),
        "text_encoder_2": lambda: text.t5(vocab_size=384, pad_token_id=0, eos_token_id=1),
        "tokenizer_2": lambda: ByT5Tokenizer(),
        "vae": lambda: AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32, 32),
            layers_per_block=1,
            scaling_factor=0.75,
            spatial_compression_ratio=8,
            sample_size=64,
        ),
        "transformer": lambda: HunyuanImageTransformer2DModel(
            **_image_transformer(4), in_channels=4, patch_size=(1, 1), text_embed_2_dim=WIDTH, rope_axes_dim=(8, 8)
        ),
    }


def _refiner() -> dict[str, Component | None]:
    return {
        **_reading(),
        "vae": lambda: AutoencoderKLHunyuanImageRefiner(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            spatial_compression_ratio=8,
            temporal_compression_ratio=4,
        ),
        "transformer": lambda: HunyuanImageTransformer2DModel(
            **_image_transformer(8), in_channels=2 * 8, patch_size=(1, 1, 1), rope_axes_dim=(4, 6, 6)
        ),
        "guider": lambda: AdaptiveProjectedMixGuidance(),
    }


def _reading() -> dict[str, Component | None]:
    return {
        "text_encoder": text.qwen2_5_vl,
        "tokenizer": lambda: text.chat_tokenizer(),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
    }


def _image_transformer(channels: int) -> dict[str, Any]:
    return {
        "out_channels": channels,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "text_embed_dim": WIDTH,
    }


def _transformer(**changes: Any) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "patch_size_t": 1,
        "text_embed_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "rope_axes_dim": (4, 6, 6),
        **changes,
    }


def _video(transformer: Component, **more: Component) -> dict[str, Component | None]:
    return {
        "text_encoder": lambda: LlamaModel(LlamaConfig(**text.decoder_config())),
        "tokenizer": lambda: text.chat_tokenizer(),
        "text_encoder_2": lambda: text.clip_text(max_position_embeddings=77),
        "tokenizer_2": lambda: text.tokenizer(start=True, length=77),
        "transformer": transformer,
        "vae": lambda: AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=7.0),
        **more,
    }


_HEADERS = ("<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def _header_tokenizer() -> PreTrainedTokenizerFast:
    made = text.chat_tokenizer()
    made.add_special_tokens({"additional_special_tokens": [*made.extra_special_tokens, *_HEADERS]})
    return made


def _video_of_picture(name: str) -> Sample:
    components = _video(
        lambda: HunyuanVideoTransformer3DModel(
            **_transformer(in_channels=2 * 4 + 1, image_condition_type="latent_concat")
        ),
        tokenizer=_header_tokenizer,
        text_encoder=_llava,
        image_processor=lambda: text.clip_images(),
    )
    # As the class has it, but for an image of four patches.
    template = {
        "template": "<|start_header_id|>system<|end_header_id|>\n\n<image>\nDescribe it:<|eot_id|>\n\n"
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        "crop_start": 24,
        "image_emb_start": 11,
        "image_emb_end": 15,
        "image_emb_len": 4,
    }
    return Sample(
        name, components, {**_VIDEO, "max_sequence_length": 160, "image": input_image(), "prompt_template": template}
    )


def _llava() -> LlavaForConditionalGeneration:
    words = text.decoder_config(model_type="llama", vocab_size=VISION_VOCABULARY_SIZE + len(_HEADERS))
    eyes = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(
            text_config=LlamaConfig(**words),
            vision_config=eyes,
            image_token_index=VISION_VOCABULARY_SIZE,
            pad_token_id=text.PAD,
        )
    )


def _framepack(name: str) -> Sample:
    components = _video(
        lambda: HunyuanVideoFramepackTransformer3DModel(
            **_transformer(guidance_embeds=True),
            has_image_proj=True,
            image_proj_dim=WIDTH,
            has_clean_x_embedder=True,
        ),
        image_encoder=text.siglip_vision,
        feature_extractor=lambda: SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    )
    return Sample(name, components, {**_VIDEO, "num_frames": 9, "latent_window_size": 3, "image": input_image()})


def _video15() -> dict[str, Component | None]:
    made = {
        name: value
        for name, value in ltx_hunyuan.hunyuan_video().components.items()
        if name not in ("image_encoder", "feature_extractor")
    }
    return {**made, "guider": lambda: ClassifierFreeGuidance(guidance_scale=4.0)}
