"""LTX and LTX-2."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LTX2VideoTransformer3DModel,
    LTXEulerAncestralRFScheduler,
)
from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
from diffusers.pipelines.ltx2 import LTX2LatentUpsamplerModel
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

from triptych.tools.families.cases import PROMPT, SIDE, input_image, video_frames
from triptych.tools.families.classes import Sample
from triptych.tools.make_model import ltx_hunyuan, text
from triptych.tools.make_model.recipe import Component

_TEXT: dict[str, Any] = {"prompt": PROMPT, "max_sequence_length": 64, "num_inference_steps": 2}
_VIDEO: dict[str, Any] = {**_TEXT, "height": SIDE, "width": SIDE, "num_frames": 9, "negative_prompt": "grey"}
_FRAMES: dict[str, Any] = {"height": SIDE, "width": SIDE, "video": video_frames(9)}


def samples() -> list[Sample]:
    """Those of both."""
    conditions = [LTX2VideoCondition(input_image())]
    return [
        _ltx("LTXPipeline", _VIDEO),
        _ltx("LTXImageToVideoPipeline", {**_VIDEO, "image": input_image()}),
        _ltx("LTXConditionPipeline", {**_VIDEO, "image": input_image()}, scheduler=_plain),
        _ltx(
            "LTXI2VLongMultiPromptPipeline",
            {
                **_VIDEO,
                "prompt": f"{PROMPT} | the same in snow",
                "num_frames": 25,
                "cond_image": input_image(),
                "temporal_tile_size": 16,
                "temporal_overlap": 8,
                "decode_horizontal_tiles": 1,
                "decode_vertical_tiles": 1,
            },
            scheduler=_plain,
        ),
        Sample(
            "LTXLatentUpsamplePipeline",
            {
                "vae": ltx_hunyuan.ltx().components["vae"],
                "latent_upsampler": lambda: LTXLatentUpsamplerModel(
                    in_channels=8, mid_channels=32, num_blocks_per_stage=1
                ),
            },
            _FRAMES,
        ),
        _ltx2("LTX2Pipeline", _VIDEO),
        _ltx2("LTX2ImageToVideoPipeline", {**_VIDEO, "image": input_image(), "image_crf": 0}),
        _ltx2("LTX2ConditionPipeline", {**_VIDEO, "conditions": conditions}, audio_scheduler=None),
        _ltx2(
            "LTX2InContextPipeline",
            {**_VIDEO, "reference_conditions": [LTX2ReferenceCondition(video_frames(9), strength=0.8)]},
            without=("duration_head",),
            audio_scheduler=None,
        ),
        _ltx2(
            "LTX2HDRPipeline",
            {**_VIDEO, "reference_conditions": [LTX2HDRReferenceCondition(video_frames(9))]},
            without=("duration_head", "processor", "prompt_enhancer"),
            audio_scheduler=None,
        ),
        Sample(
            "LTX2LatentUpsamplePipeline",
            {"vae": ltx_hunyuan.ltx2().components["vae"], "latent_upsampler": _upsampler},
            {**_FRAMES, "num_frames": 9},
        ),
        Sample(
            "LTX2VideoDiffusionDecodePipeline",
            {
                "diffusion_decoder": ltx_hunyuan.ltx25().components["diffusion_decoder"],
                "scheduler": FlowMatchEulerDiscreteScheduler,
                "vae": ltx_hunyuan.ltx2().components["vae"],
            },
            {"latents": _latents(2)},
        ),
        _ltx2(
            "LTX2DFRPipeline",
            {"prompt": PROMPT, "height": SIDE, "width": SIDE, "num_frames": 9, **_ROUND},
            transformer=_keyframed,
            scheduler=_plain,
        ),
        _ltx2(
            "LTX2DFRTemporalRefinePipeline",
            {
                "prompt": PROMPT,
                "height": SIDE,
                "width": SIDE,
                "num_frames": 9,
                **_ROUND,
                "latents": _latents(2),
                "keyframes_latents": _latents(1),
                "keyframe_positions": [8],
                "audio_latents": torch.linspace(-1, 1, 2 * 9 * 4).reshape(1, 2, 9, 4),
            },
            without=("duration_head", "processor", "prompt_enhancer"),
            transformer=_keyframed,
            scheduler=lambda: LTXEulerAncestralRFScheduler(eta=0.5),
            temporal_latent_upsampler=lambda: _upsampler(spatial_upsample=False, temporal_upsample=True),
        ),
    ]


_ROUND: dict[str, Any] = {"sigmas": [1.0, 0.6], "max_sequence_length": 64}


def _ltx(name: str, inputs: dict[str, Any], **more: Component | None) -> Sample:
    return Sample(name, {**ltx_hunyuan.ltx().components, **more}, inputs)


def _plain() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def _ltx2(name: str, inputs: dict[str, Any], without: tuple[str, ...] = (), **more: Component | None) -> Sample:
    components = {part: made for part, made in ltx_hunyuan.ltx2().components.items() if part not in without}
    # As that of the original: the class sets it where it reads a prompt, and asks for it later.
    components["tokenizer"] = lambda: text.chat_tokenizer(padding_side="left")
    return Sample(name, {**components, **more}, inputs)


def _keyframed() -> LTX2VideoTransformer3DModel:
    return LTX2VideoTransformer3DModel(**ltx_hunyuan.ltx2_transformer(), use_keyframes_abs_pos_embedding=True)


def _upsampler(**changes: Any) -> LTX2LatentUpsamplerModel:
    return LTX2LatentUpsamplerModel(
        in_channels=4, mid_channels=32, num_blocks_per_stage=1, use_rational_resampler=False, **changes
    )


def _latents(frames: int) -> torch.Tensor:
    side = SIDE // 32
    return torch.linspace(-1, 1, 4 * frames * side * side).reshape(1, 4, frames, side, side)
