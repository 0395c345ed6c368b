"""What is made of Stable Diffusion by adapters, guidance of attention, depth, upscaling, embeddings of images."""

from __future__ import annotations

from typing import Any, Final

import diffusers
import torch
from diffusers import (
    ControlNetXSAdapter,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PriorTransformer,
    SD3ControlNetModel,
    T2IAdapter,
    UNet2DConditionModel,
)
from transformers import CLIPProcessor, DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

from triptych.tools.families.cases import PROMPT, input_image, mask
from triptych.tools.families.classes import Sample
from triptych.tools.families.classes.stable_diffusion import EDIT, FROM_IMAGE, TEXT, checked, sd, unet, xl
from triptych.tools.make_model import stable_diffusion, text, vaes
from triptych.tools.make_model.text import WIDTH

_SWAPPED: Final = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
"""Levels of a UNet as an adapter takes them to be: what it makes is added before the next one is smaller."""
_SAYS: Final = {"prompt": PROMPT, "num_inference_steps": 3}


def samples() -> list[Sample]:
    """Those of this module."""
    return [*_conditioned(), *_adapted(), *_guided(), *_unclip(), *_edited(), *_marigold()]


def _conditioned() -> list[Sample]:
    image = {"image": input_image()}
    depth = {**sd(in_channels=5), "depth_estimator": _depth, "feature_extractor": _depth_pictures}
    variation = {**sd(), "feature_extractor": text.clip_images}
    sd3 = stable_diffusion.sd3(channels=16).components
    control = {**sd3, "controlnet": lambda: _sd3_controlnet(extra=None)}
    painting = {**sd3, "controlnet": lambda: _sd3_controlnet(extra=1)}
    shown = {**EDIT, "height": 64, "width": 64}
    return [
        Sample("StableDiffusionDepth2ImgPipeline", depth, {**FROM_IMAGE, **image}),
        Sample("StableDiffusionImageVariationPipeline", variation, {**image, "height": 64, "width": 64, **_steps(3)}),
        Sample(
            "StableDiffusionLatentUpscalePipeline",
            {"unet": _upscaler, "vae": _vae, "scheduler": _sampling},
            {**_SAYS, "image": input_image()},
        ),
        Sample(
            "StableDiffusionUpscalePipeline",
            {**sd(in_channels=7, num_class_embeds=1000), "max_noise_level": 350},
            {**EDIT, "image": input_image().resize((16, 16))},
        ),
        Sample("StableDiffusion3ControlNetPipeline", control, {**shown, "control_image": input_image(2)}),
        Sample(
            "StableDiffusion3ControlNetInpaintingPipeline",
            painting,
            {**shown, "control_image": input_image(2), "control_mask": mask()},
        ),
    ]


def _adapted() -> list[Sample]:
    union = {**xl(), "controlnet": stable_diffusion.sdxl_union().components["controlnet"]}
    kinds = {"control_mode": [1], "control_image": [input_image(2)]}
    paint = {"image": input_image(), "mask_image": mask()}
    return [
        Sample("StableDiffusionXLControlNetUnionPipeline", union, {**EDIT, **kinds}),
        Sample(
            "StableDiffusionXLControlNetUnionImg2ImgPipeline", union, {**FROM_IMAGE, "image": input_image(), **kinds}
        ),
        Sample("StableDiffusionXLControlNetUnionInpaintPipeline", union, {**FROM_IMAGE, **paint, **kinds}),
        Sample(
            "StableDiffusionAdapterPipeline",
            {**sd(**_SWAPPED), "adapter": lambda: _adapter(8, 16)},
            {**EDIT, "image": input_image(2)},
        ),
        Sample(
            "StableDiffusionXLAdapterPipeline",
            {**xl(**_SWAPPED), "adapter": lambda: _adapter(16, 32)},
            {**EDIT, "image": input_image(2)},
        ),
        Sample(
            "StableDiffusionControlNetXSPipeline",
            {**sd(layers_per_block=2), "controlnet": _xs},
            {**EDIT, "image": input_image(2)},
        ),
        Sample(
            "StableDiffusionXLControlNetXSPipeline",
            {**xl(layers_per_block=2), "controlnet": _xs_xl},
            {**EDIT, "image": input_image(2)},
        ),
        Sample(
            "StableDiffusionGLIGENPipeline",
            sd(attention_type="gated"),
            {**TEXT, "gligen_phrases": ["a ship"], "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]]},
        ),
        Sample(
            "StableDiffusionGLIGENTextImagePipeline",
            {**sd(attention_type="gated-text-image"), "processor": _clip_processor, "image_project": _image_project},
            {
                **TEXT,
                "gligen_phrases": ["a ship"],
                "gligen_images": [input_image(3)],
                "gligen_boxes": [[0.1, 0.2, 0.6, 0.7]],
            },
        ),
    ]


def _guided() -> list[Sample]:
    return [
        Sample(
            "StableDiffusionAttendAndExcitePipeline",
            sd(),
            {**TEXT, "width": 64, "token_indices": [2, 5], "max_iter_to_alter": 1, "attn_res": (8, 8)},
        ),
        Sample("StableDiffusionLDM3DPipeline", {**sd(), "vae": lambda: _vae(channels=4)}, TEXT),
        Sample("StableDiffusionParadigmsPipeline", {**sd(), "scheduler": diffusers.DDIMParallelScheduler}, TEXT),
        Sample("StableDiffusionModelEditingPipeline", sd(), TEXT),
        Sample("StableDiffusionPipelineSafe", {**sd(), "safety_checker": None}, TEXT),
        Sample(
            "SemanticStableDiffusionPipeline",
            sd(),
            {**TEXT, "editing_prompt": ["a ship"], "edit_warmup_steps": 1, "edit_guidance_scale": 5.0},
        ),
    ]


def _unclip() -> list[Sample]:
    parts: dict[str, Any] = {
        **sd(class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH),
        "prior": prior,
        "prior_text_encoder": lambda: text.clip_text(projection=True, max_position_embeddings=77),
        "prior_scheduler": lambda: diffusers.UnCLIPScheduler(prediction_type="sample", clip_sample_range=5.0),
        "image_normalizer": _normalizer,
        "image_noising_scheduler": lambda: DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "feature_extractor": text.clip_images,
    }
    return [
        Sample("StableUnCLIPPipeline", parts, {**TEXT, "prior_num_inference_steps": 2}),
        Sample("StableUnCLIPImg2ImgPipeline", parts, {**TEXT, "image": input_image()}),
    ]


def _edited() -> list[Sample]:
    inverted = "one call does not do: it works on what `invert` of the same pipeline left there"
    latents = torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    return [
        Sample("LEditsPPPipelineStableDiffusion", unbuilt=inverted),
        Sample("LEditsPPPipelineStableDiffusionXL", unbuilt=inverted),
        Sample(
            "StableDiffusionDiffEditPipeline",
            {**sd(), "inverse_scheduler": DDIMInverseScheduler},
            {**EDIT, "mask_image": mask().resize((16, 16)), "image_latents": latents, "inpaint_strength": 1.0},
        ),
        Sample(
            "StableDiffusionInpaintPipelineLegacy",
            {**sd(), **checked()},
            {**FROM_IMAGE, "image": input_image(), "mask_image": mask()},
        ),
        Sample(
            "CycleDiffusionPipeline",
            {**sd(), "scheduler": lambda: DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False)},
            {**_SAYS, "source_prompt": "a ship", "image": input_image(), "strength": 0.7, "eta": 0.1},
        ),
        Sample(
            "StableDiffusionPix2PixZeroPipeline",
            {
                **sd(),
                "scheduler": DDIMScheduler,
                "caption_generator": None,
                "caption_processor": None,
                "inverse_scheduler": DDIMInverseScheduler,
            },
            {**TEXT, "source_embeds": _embeds(1), "target_embeds": _embeds(2)},
        ),
    ]


def _marigold() -> list[Sample]:
    small = {"default_denoising_steps": 2, "default_processing_resolution": 64, "scheduler": DDIMScheduler}
    names: dict[str, Any] = {"target_names": ["albedo", "material"], "albedo": {"prediction_space": "srgb"}}
    names["material"] = {"prediction_space": "stack", "sub_target_names": ["roughness", "metallicity", None]}
    names |= {name: {"prediction_space": "linear"} for name in ("roughness", "metallicity")}
    parts = {**sd(in_channels=8), **small}
    two = {**sd(in_channels=12, out_channels=8), **small, "target_properties": names}
    return [
        Sample("MarigoldDepthPipeline", {**parts, "prediction_type": "depth"}, {"image": input_image()}),
        Sample("MarigoldNormalsPipeline", {**parts, "prediction_type": "normals"}, {"image": input_image()}),
        Sample("MarigoldIntrinsicsPipeline", {**two, "prediction_type": "intrinsics"}, {"image": input_image()}),
    ]


def prior(**changes: Any) -> PriorTransformer:
    """What makes an embedding of an image of one of a text."""
    made = PriorTransformer(
        **{"num_attention_heads": 2, "attention_head_dim": 12, "embedding_dim": WIDTH, "num_layers": 1, **changes}
    )
    made.clip_std = torch.nn.Parameter(torch.ones_like(made.clip_std))
    return made


def _steps(number: int) -> dict[str, Any]:
    return {"num_inference_steps": number}


def _embeds(seed: int) -> torch.Tensor:
    return torch.randn(1, 77, WIDTH, generator=torch.Generator().manual_seed(seed))


def _vae(channels: int = 3, **more: Any) -> Any:
    return vaes.kl(quant=True, shift=None, in_channels=channels, out_channels=channels, **more)


def _sampling() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(prediction_type="sample")


def _upscaler() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=[32, 32, 64, 64],
        layers_per_block=1,
        time_cond_proj_dim=160,
        conv_in_kernel=1,
        conv_out_kernel=1,
        cross_attention_dim=WIDTH,
        down_block_types=("KDownBlock2D", *["KCrossAttnDownBlock2D"] * 3),
        up_block_types=(*["KCrossAttnUpBlock2D"] * 3, "KUpBlock2D"),
        in_channels=8,
        out_channels=5,
        mid_block_type=None,
        only_cross_attention=False,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
    )


def _depth() -> DPTForDepthEstimation:
    return DPTForDepthEstimation(
        DPTConfig(
            image_size=32,
            patch_size=16,
            hidden_size=WIDTH,
            num_hidden_layers=4,
            backbone_out_indices=(0, 1, 2, 3),
            num_attention_heads=2,
            intermediate_size=2 * WIDTH,
            neck_hidden_sizes=[8, 8, 8, 8],
            fusion_hidden_size=8,
        )
    )


def _depth_pictures() -> DPTImageProcessorPil:
    return DPTImageProcessorPil(size={"height": 32, "width": 32})


def _sd3_controlnet(extra: int | None) -> SD3ControlNetModel:
    return SD3ControlNetModel(
        sample_size=32,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=32,
        extra_conditioning_channels=extra or 0,
    )


def _adapter(*channels: int) -> T2IAdapter:
    return T2IAdapter(channels=list(channels), num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter")


def _xs() -> ControlNetXSAdapter:
    return ControlNetXSAdapter.from_unet(
        unet(layers_per_block=2), size_ratio=1, conditioning_embedding_out_channels=(8, 8, 8)
    )


def _xs_xl() -> ControlNetXSAdapter:
    made = stable_diffusion.sdxl_unet(layers_per_block=2)
    return ControlNetXSAdapter.from_unet(made, size_ratio=1, conditioning_embedding_out_channels=(8, 8, 8))


def _clip_processor() -> CLIPProcessor:
    return CLIPProcessor(image_processor=text.clip_images(), tokenizer=text.tokenizer(start=True, length=77))


def _normalizer() -> Any:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    return StableUnCLIPImageNormalizer(embedding_dim=WIDTH)


def _image_project() -> Any:
    from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection

    return CLIPImageProjection(hidden_size=WIDTH)
