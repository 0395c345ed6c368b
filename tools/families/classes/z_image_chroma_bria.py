"""Z-Image, Chroma, Bria and AuraFlow."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowTransformer2DModel,
    BriaFiboTransformer2DModel,
    BriaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    ZImageControlNetModel,
)
from transformers import (
    Siglip2ImageProcessorPil,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from triptych.tools.families.cases import PROMPT, SIDE, SMALL, SQUARE, input_image, mask
from triptych.tools.families.classes import Sample
from triptych.tools.make_model import classic_pipelines, image_models, text, vaes
from triptych.tools.make_model.recipe import Component
from triptych.tools.make_model.text import TEXT_LENGTH, WIDTH

_TEXT: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "grey", "max_sequence_length": 128, **SMALL}
_IMAGE: dict[str, Any] = {**_TEXT, **SQUARE, "image": input_image(), "strength": 0.7}
_MASKED: dict[str, Any] = {**_IMAGE, "mask_image": mask()}
_CONTROL: dict[str, Any] = {"control_image": input_image(1)}


def samples() -> list[Sample]:
    """Those of each."""
    return [
        Sample("ZImagePipeline", image_models.z_image().components, _TEXT),
        Sample("ZImageImg2ImgPipeline", image_models.z_image().components, _IMAGE),
        Sample("ZImageInpaintPipeline", image_models.z_image().components, _MASKED),
        _z_net("ZImageControlNetPipeline", {**_TEXT, **_CONTROL}),
        _z_net(
            "ZImageControlNetInpaintPipeline",
            {**{name: value for name, value in _MASKED.items() if name != "strength"}, **_CONTROL},
            channels=2 * 4 + 1,
        ),
        _z_omni("ZImageOmniPipeline"),
        Sample("ChromaPipeline", classic_pipelines.chroma().components, _TEXT),
        Sample("ChromaImg2ImgPipeline", classic_pipelines.chroma().components, _IMAGE),
        Sample(
            "ChromaInpaintPipeline", {**classic_pipelines.chroma().components, "transformer": _unguided_chroma}, _MASKED
        ),
        _aura("AuraFlowPipeline"),
        _bria("BriaPipeline"),
        _fibo(
            "BriaFiboPipeline",
            {"prompt": '{"text": "a red ship"}', "negative_prompt": "grey", "height": SIDE, "width": SIDE},
        ),
        _fibo(
            "BriaFiboEditPipeline",
            {
                "prompt": '{"text": "a red ship", "edit_instruction": "paint the ship blue"}',
                "height": SIDE,
                "width": SIDE,
                "image": input_image(),
                "_auto_resize": False,
                "negative_prompt": "grey",
            },
        ),
    ]


def _z_net(name: str, inputs: dict[str, Any], channels: int = 4) -> Sample:
    return Sample(
        name,
        {
            **image_models.z_image().components,
            "controlnet": lambda: ZImageControlNetModel(
                control_layers_places=[0, 1],
                control_refiner_layers_places=[0],
                control_in_dim=channels,
                dim=WIDTH,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
            ),
        },
        inputs,
    )


def _z_omni(name: str) -> Sample:
    components: dict[str, Component | None] = {
        **image_models.z_image().components,
        "transformer": lambda: image_models.z_image_transformer(siglip_feat_dim=WIDTH),
        "siglip": lambda: Siglip2VisionModel(
            Siglip2VisionConfig(
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_patches=16,
                patch_size=16,
            )
        ),
        "siglip_processor": lambda: Siglip2ImageProcessorPil(patch_size=16, max_num_patches=16),
    }
    return Sample(name, components, {**_TEXT, **SQUARE})


def _unguided_chroma() -> Any:
    make = classic_pipelines.chroma().components["transformer"]
    transformer: Any = make() if make else None
    # The class asks its configuration, which has it only where it was written by hand.
    transformer.register_to_config(guidance_embeds=False)
    return transformer


def _aura(name: str) -> Sample:
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.tokenizer(start=False),
        "text_encoder": text.umt5,
        "vae": lambda: vaes.kl(shift=None),
        "transformer": lambda: AuraFlowTransformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            caption_projection_dim=WIDTH,
            joint_attention_dim=WIDTH,
            pos_embed_max_size=256,
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=1.73),
    }
    return Sample(name, components, {**_TEXT, "max_sequence_length": TEXT_LENGTH})


def _bria_transformer() -> dict[str, Any]:
    return {
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "pooled_projection_dim": None,
        "axes_dims_rope": [0, 8, 8],
    }


def _bria(name: str) -> Sample:
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.tokenizer(start=False),
        "text_encoder": text.t5,
        "vae": lambda: vaes.kl(quant=True, shift=0.0),
        "transformer": lambda: BriaTransformer2DModel(**_bria_transformer(), joint_attention_dim=WIDTH),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(),
        "image_encoder": None,
        "feature_extractor": None,
    }
    return Sample(name, components, {**_TEXT, **SQUARE, "max_sequence_length": 48})


def _fibo(name: str, inputs: dict[str, Any]) -> Sample:
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.chat_tokenizer(),
        "text_encoder": lambda: SmolLM3ForCausalLM(SmolLM3Config(**text.decoder_config())),
        "vae": vaes.wan_full,
        "transformer": lambda: BriaFiboTransformer2DModel(
            **{**_bria_transformer(), "in_channels": 4}, joint_attention_dim=2 * WIDTH, text_encoder_dim=WIDTH
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(),
    }
    return Sample(name, components, {"num_inference_steps": 2, "max_sequence_length": 128, **inputs})
