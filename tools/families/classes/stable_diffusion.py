"""Stable Diffusion 1.5 and 2, XL, and what is made of them."""

from __future__ import annotations

from typing import Any, Final

from diffusers import ControlNetModel, UNet2DConditionModel
from transformers import CLIPConfig

from triptych.tools.families.cases import PROMPT, input_image, mask
from triptych.tools.families.classes import Sample
from triptych.tools.make_model import stable_diffusion, text
from triptych.tools.make_model.text import WIDTH

TEXT: Final[dict[str, Any]] = {
    "prompt": PROMPT,
    "negative_prompt": "grey",
    "height": 64,
    "width": 48,
    "num_inference_steps": 3,
}
FROM_IMAGE: Final[dict[str, Any]] = {
    "prompt": PROMPT,
    "negative_prompt": "grey",
    "num_inference_steps": 3,
    "strength": 0.7,
}
EDIT: Final[dict[str, Any]] = {"prompt": PROMPT, "negative_prompt": "grey", "num_inference_steps": 3}
_UNCHECKED: Final[dict[str, Any]] = {
    "safety_checker": None,
    "feature_extractor": None,
    "requires_safety_checker": False,
}
_NET: Final[dict[str, Any]] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
}


def unet(**changes: Any) -> UNet2DConditionModel:
    """The UNet of Stable Diffusion 1.5, with two levels."""
    return UNet2DConditionModel(
        **{"sample_size": 16, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), **_NET, **changes}
    )


def controlnet(**changes: Any) -> ControlNetModel:
    """Its ControlNet."""
    return ControlNetModel(conditioning_embedding_out_channels=(8, 16, 16), **{**_NET, **changes})


def sd(**changes: Any) -> dict[str, Any]:
    """Stable Diffusion 1.5; changes are of its UNet."""
    return {**_UNCHECKED, "unet": lambda: unet(**changes), "controlnet": controlnet}


def xl(**changes: Any) -> dict[str, Any]:
    """Stable Diffusion XL with what it may have besides; changes are of its UNet."""
    known = dict(stable_diffusion.sdxl().components)
    del known["image_encoder"]
    known["unet"] = lambda: stable_diffusion.sdxl_unet(**changes)
    return {**known, "add_watermarker": False}


def checked() -> dict[str, Any]:
    """A safety checker that finds nothing, for classes that cannot be without one."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    config = CLIPConfig(
        vision_config=text.clip_vision().config.to_dict(),
        text_config=text.clip_text().config.to_dict(),
        projection_dim=WIDTH,
    )
    return {
        "safety_checker": lambda: StableDiffusionSafetyChecker(config),
        "feature_extractor": text.clip_images,
        "requires_safety_checker": True,
    }


def samples() -> list[Sample]:
    """Those of this module."""
    return [*_first(), *_controlled(), *_larger()]


def _first() -> list[Sample]:
    lcm = sd(time_cond_proj_dim=8)
    image = {"image": input_image()}
    paint = {**image, "mask_image": mask(), "height": 64, "width": 64}
    return [
        Sample("StableDiffusionPipeline", sd(), TEXT),
        Sample("StableDiffusionImg2ImgPipeline", sd(), {**FROM_IMAGE, **image}),
        Sample("StableDiffusionInpaintPipeline", sd(), {**FROM_IMAGE, **paint}),
        Sample("StableDiffusionInstructPix2PixPipeline", sd(in_channels=8), {**EDIT, **image}),
        Sample("StableDiffusionPAGPipeline", sd(), TEXT),
        Sample("StableDiffusionPAGImg2ImgPipeline", sd(), {**FROM_IMAGE, **image}),
        Sample("StableDiffusionPAGInpaintPipeline", sd(), {**FROM_IMAGE, **paint}),
        Sample("LatentConsistencyModelPipeline", lcm, _without(TEXT, "negative_prompt")),
        Sample("LatentConsistencyModelImg2ImgPipeline", lcm, {**_without(FROM_IMAGE, "negative_prompt"), **image}),
        Sample("StableDiffusionSAGPipeline", sd(), TEXT),
        Sample("StableDiffusionPanoramaPipeline", sd(), {**TEXT, "circular_padding": True}),
    ]


def _controlled() -> list[Sample]:
    control = {"control_image": input_image(2)}
    image = {"image": input_image()}
    paint = {**image, "mask_image": mask()}
    made = []
    for name in ("", "PAG"):
        made += [
            Sample(f"StableDiffusionControlNet{name}Pipeline", sd(), {**EDIT, "image": input_image(2)}),
            Sample(f"StableDiffusionControlNet{name}InpaintPipeline", sd(), {**FROM_IMAGE, **paint, **control}),
            Sample(f"StableDiffusionXLControlNet{name}Pipeline", xl(), {**EDIT, "image": input_image(2)}),
            Sample(f"StableDiffusionXLControlNet{name}Img2ImgPipeline", xl(), {**FROM_IMAGE, **image, **control}),
        ]
    return [
        *made,
        Sample("StableDiffusionControlNetImg2ImgPipeline", sd(), {**FROM_IMAGE, **image, **control}),
        Sample("StableDiffusionXLControlNetInpaintPipeline", xl(), {**FROM_IMAGE, **paint, **control}),
    ]


def _larger() -> list[Sample]:
    image = {"image": input_image()}
    square = {"height": 64, "width": 64}
    paint = {**image, "mask_image": mask()}
    return [
        Sample("StableDiffusionXLPipeline", xl(), TEXT),
        Sample("StableDiffusionXLImg2ImgPipeline", xl(), {**FROM_IMAGE, **image}),
        Sample("StableDiffusionXLInpaintPipeline", xl(), {**FROM_IMAGE, **paint}),
        Sample("StableDiffusionXLInstructPix2PixPipeline", xl(in_channels=8), {**EDIT, **square, **image}),
        Sample("StableDiffusionXLPAGPipeline", xl(), TEXT),
        Sample("StableDiffusionXLPAGImg2ImgPipeline", xl(), {**FROM_IMAGE, **image}),
        Sample("StableDiffusionXLPAGInpaintPipeline", xl(), {**FROM_IMAGE, **paint}),
        Sample("StableDiffusion3Pipeline", stable_diffusion.sd3().components, TEXT),
        Sample("StableDiffusion3Img2ImgPipeline", stable_diffusion.sd3().components, {**FROM_IMAGE, **image}),
        Sample(
            "StableDiffusion3InpaintPipeline", stable_diffusion.sd3(channels=16).components, {**FROM_IMAGE, **paint}
        ),
        Sample("StableDiffusion3PAGPipeline", stable_diffusion.sd3().components, TEXT),
        Sample("StableDiffusion3PAGImg2ImgPipeline", stable_diffusion.sd3().components, {**FROM_IMAGE, **image}),
    ]


def _without(inputs: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in names}
