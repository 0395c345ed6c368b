"""Images of one transformer or UNet: HiDream, OmniGen, DiT, PRX, Ovis, LongCat, Krea, Ideogram, JoyImage and others."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderTiny,
    BriaFibo2Transformer2DModel,
    DDIMScheduler,
    DiTTransformer2DModel,
    DreamLiteUNetModel,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImageTransformer2DModel,
    JoyImageEditPlusTransformer3DModel,
    JoyImageEditTransformer3DModel,
    LongCatImageTransformer2DModel,
    NucleusMoEImageTransformer2DModel,
    OmniGenTransformer2DModel,
    OvisImageTransformer2DModel,
    PRXTransformer2DModel,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Model,
    Qwen3VLForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaEncoderModel,
    T5GemmaModuleConfig,
)
from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

from triptych.tools.families.cases import PROMPT, SIDE, VISION, input_image
from triptych.tools.families.classes import Sample
from triptych.tools.make_model import classic_pipelines, ideogram, image_models, text, vaes
from triptych.tools.make_model.recipe import Component
from triptych.tools.make_model.text import VISION_VOCABULARY_SIZE, VOCABULARY_SIZE, WIDTH

_SMALL: dict[str, Any] = {"prompt": PROMPT, "height": SIDE, "width": SIDE, "num_inference_steps": 2}
_GUIDED: dict[str, Any] = {**_SMALL, "negative_prompt": "grey"}


def samples() -> list[Sample]:
    """Those of each."""
    image = {"image": input_image()}
    edit = {"prompt": PROMPT, "negative_prompt": "grey", "num_inference_steps": 2, **image}
    return [
        _hidream("HiDreamImagePipeline"),
        _omnigen("OmniGenPipeline"),
        _dit("DiTPipeline"),
        _prx("PRXPipeline"),
        _prx_pixel("PRXPixelPipeline"),
        _ovis("OvisImagePipeline"),
        # Without a request to rewrite the prompt it needs no more of the processor than a tokenizer is.
        Sample(
            "LongCatImagePipeline",
            {**_longcat(), "text_processor": text.chat_tokenizer},
            {**_GUIDED, "enable_prompt_rewrite": False},
        ),
        Sample(
            "LongCatImageEditPipeline", {**_longcat(), "text_processor": text.qwen2_vl_processor}, edit, needs=VISION
        ),
        Sample("Krea2Pipeline", image_models.krea2(turbo=False).components, {**_GUIDED, "max_sequence_length": 128}),
        Sample(
            "Ideogram4Pipeline",
            ideogram.ideogram4().components,
            {**_SMALL, "guidance_schedule": [7.0, 3.0], "max_sequence_length": 128},
        ),
        Sample(
            "JoyImageEditPipeline",
            _joy(lambda: JoyImageEditTransformer3DModel(**_joy_transformer())),
            {**edit, "height": 32, "width": 32},
            needs=VISION,
        ),
        Sample(
            "JoyImageEditPlusPipeline",
            _joy(lambda: JoyImageEditPlusTransformer3DModel(**_joy_transformer())),
            {**_GUIDED, "height": 32, "width": 32, "images": [input_image(), input_image(1)]},
            needs=VISION,
        ),
        Sample("NucleusMoEImagePipeline", _nucleus(), {**_GUIDED, "return_index": -1}, needs=VISION),
        Sample("GlmImagePipeline", classic_pipelines.glm_image().components, {**_SMALL, "guidance_scale": 1.5}),
        Sample("ErnieImagePipeline", image_models.ernie().components, {**_GUIDED}),
        Sample("DreamLitePipeline", _dreamlite(), _GUIDED, needs=VISION),
        Sample("DreamLiteMobilePipeline", _dreamlite(), _SMALL, needs=VISION),
        Sample("BriaFibo2Pipeline", _fibo2(), {**_GUIDED, "prompt": '{"text": "a red ship"}'}, needs=VISION),
    ]


def _shift() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _hidream(name: str) -> Sample:
    components: dict[str, Component | None] = {
        "text_encoder": lambda: text.clip_text(projection=True, max_position_embeddings=128),
        "tokenizer": lambda: text.tokenizer(start=True, length=128),
        "text_encoder_2": lambda: text.clip_text(projection=True, max_position_embeddings=128),
        "tokenizer_2": lambda: text.tokenizer(start=True, length=128),
        "text_encoder_3": text.t5,
        "tokenizer_3": lambda: text.tokenizer(start=False, length=128),
        "text_encoder_4": lambda: LlamaForCausalLM(LlamaConfig(**text.decoder_config())),
        "tokenizer_4": text.chat_tokenizer,
        "scheduler": _shift,
        "vae": vaes.kl,
        "transformer": lambda: HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_channels=[WIDTH, WIDTH],
            text_emb_dim=2 * WIDTH,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(32, 32),
            llama_layers=(0, 1),
        ),
    }
    return Sample(name, components, {**_GUIDED, "max_sequence_length": 64})


def _omnigen(name: str) -> Sample:
    components: dict[str, Component | None] = {
        "transformer": lambda: OmniGenTransformer2DModel(
            hidden_size=WIDTH,
            num_attention_heads=2,
            num_key_value_heads=2,
            intermediate_size=2 * WIDTH,
            num_layers=1,
            in_channels=4,
            time_step_dim=4,
            vocab_size=VISION_VOCABULARY_SIZE,
            pad_token_id=text.PAD,
            rope_scaling={"long_factor": [1.0] * 8, "short_factor": [1.0] * 8},
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        "vae": lambda: vaes.kl(levels=4, shift=None),
        "tokenizer": text.chat_tokenizer,
    }
    seen = {"prompt": "the same in snow: <img><|image_1|></img>", "input_images": [input_image()]}
    return Sample(name, components, {**_SMALL, **seen}, needs=VISION)


def _dit(name: str) -> Sample:
    components: dict[str, Any] = {
        "transformer": lambda: DiTTransformer2DModel(
            sample_size=16,
            num_layers=1,
            patch_size=4,
            attention_head_dim=16,
            num_attention_heads=2,
            in_channels=4,
            out_channels=8,
            attention_bias=True,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_zero",
            norm_elementwise_affine=False,
        ),
        "vae": lambda: vaes.kl(shift=None),
        "scheduler": lambda: DDIMScheduler(),
    }
    return Sample(name, components, {"class_labels": [7], "num_inference_steps": 2})


def _prx(name: str) -> Sample:
    components: dict[str, Component | None] = {
        "transformer": lambda: PRXTransformer2DModel(**_prx_transformer(in_channels=4)),
        "scheduler": _shift,
        "text_encoder": _t5_gemma_alone,
        "tokenizer": lambda: text.tokenizer(start=False),
        "vae": vaes.kl,
    }
    return Sample(name, components, {**_GUIDED, "use_resolution_binning": False, "skip_text_cleaning": True})


def _prx_pixel(name: str) -> Sample:
    components: dict[str, Any] = {
        "transformer": lambda: PRXTransformer2DModel(
            **_prx_transformer(in_channels=3), bottleneck_size=8, resolution_embeds=True
        ),
        "scheduler": _shift,
        "text_encoder": lambda: text.qwen3(Qwen3Model),
        "tokenizer": text.chat_tokenizer,
        "prompt_max_tokens": 64,
    }
    return Sample(name, components, {**_GUIDED, "height": 32, "width": 32, "use_resolution_binning": False})


def _prx_transformer(in_channels: int) -> dict[str, Any]:
    return {
        "patch_size": 2,
        "in_channels": in_channels,
        "context_in_dim": WIDTH,
        "hidden_size": WIDTH,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "axes_dim": [8, 8],
    }


def t5_gemma_part() -> T5GemmaModuleConfig:
    """One half of T5Gemma."""
    made = text.decoder_config(
        vocab_size=VOCABULARY_SIZE, head_dim=16, layer_types=["full_attention"] * 2, dropout_rate=0.0
    )
    return T5GemmaModuleConfig(**made)


def t5_gemma() -> T5GemmaEncoderModel:
    """The encoder of T5Gemma."""
    part = t5_gemma_part().to_dict()
    return T5GemmaEncoderModel(T5GemmaConfig(encoder=part, decoder=part, is_encoder_decoder=False))


def _t5_gemma_alone() -> T5GemmaEncoder:
    encoder = T5GemmaEncoder(t5_gemma_part())
    # The class reads its configuration as that of both halves.
    encoder.config = T5GemmaConfig(encoder=t5_gemma_part(), decoder=t5_gemma_part(), is_encoder_decoder=False)
    return encoder


def _ovis(name: str) -> Sample:
    components: dict[str, Component | None] = {
        "transformer": lambda: OvisImageTransformer2DModel(
            patch_size=1,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "text_encoder": lambda: text.qwen3(Qwen3Model),
        "tokenizer": text.chat_tokenizer,
        "vae": vaes.kl,
    }
    return Sample(name, components, _GUIDED)


def _longcat() -> dict[str, Component | None]:
    return {
        "transformer": lambda: LongCatImageTransformer2DModel(
            in_channels=4 * 16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=[4, 6, 6],
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        "text_encoder": text.qwen2_5_vl,
        "tokenizer": text.chat_tokenizer,
        # The class counts on 16 channels.
        "vae": lambda: vaes.kl(levels=4, latent_channels=16),
    }


def _qwen3_vl() -> Any:
    return text.qwen3_vl(Qwen3VLForConditionalGeneration)


def _joy(transformer: Component) -> dict[str, Component | None]:
    return {
        "transformer": transformer,
        "scheduler": _shift,
        "vae": vaes.wan_full,
        "text_encoder": _qwen3_vl,
        "tokenizer": text.chat_tokenizer,
        "processor": text.qwen3_vl_processor,
    }


def _joy_transformer() -> dict[str, Any]:
    return {
        "patch_size": [1, 2, 2],
        "in_channels": 4,
        "hidden_size": WIDTH,
        "num_attention_heads": 2,
        "text_dim": WIDTH,
        "num_layers": 1,
        "rope_dim_list": [4, 6, 6],
    }


def _nucleus() -> dict[str, Component | None]:
    return {
        "transformer": lambda: NucleusMoEImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 6, 6),
            moe_enabled=False,
            capacity_factors=[8.0, 8.0],
        ),
        "scheduler": _shift,
        "vae": vaes.qwen,
        "text_encoder": _qwen3_vl,
        "processor": text.qwen3_vl_processor,
    }


def _dreamlite() -> dict[str, Component | None]:
    return {
        "unet": lambda: DreamLiteUNetModel(
            sample_size=16,
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            block_out_channels=(16, 32),
            cross_attention_dim=WIDTH,
            attention_head_dim=8,
            layers_per_block=1,
            norm_num_groups=8,
        ),
        "scheduler": _shift,
        "vae": lambda: AutoencoderTiny(
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            latent_channels=4,
        ),
        "text_encoder": _qwen3_vl,
        "tokenizer": text.chat_tokenizer,
        "processor": text.qwen3_vl_processor,
    }


def _fibo2() -> dict[str, Component | None]:
    return {
        "transformer": lambda: BriaFibo2Transformer2DModel(
            in_channels=4,
            patch_size=2,
            dim=WIDTH,
            n_layers=6,
            n_refiner_layers=1,
            n_heads=2,
            # The states of three layers, for the first layer and for five others.
            cap_feat_dim=3 * WIDTH,
            injection_layer_ids=(1, 2, 3, 4, 5),
            perceiver_num_layers=1,
            min_num_gist_tokens=8,
            max_num_gist_tokens=16,
            gist_step=4,
            axes_dims=(4, 6, 6),
            axes_lens=(2048, 64, 64),
        ),
        "scheduler": _shift,
        "vae": vaes.flux2,
        "text_encoder": lambda: text.qwen3_vl(Qwen3VLForConditionalGeneration, layers=36),
        "processor": text.qwen3_vl_processor,
    }
