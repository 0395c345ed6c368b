"""Videos of UNets: AnimateDiff, Stable Video Diffusion and the first text-to-video models."""

from __future__ import annotations

from typing import Any, Final

from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    I2VGenXLUNet,
    MotionAdapter,
    SparseControlNetModel,
    UNet3DConditionModel,
    UNetSpatioTemporalConditionModel,
)

from triptych.tools.families.cases import PROMPT, input_image, video_frames
from triptych.tools.families.classes import Sample
from triptych.tools.families.classes.stable_diffusion import checked, sd, xl
from triptych.tools.make_model import text
from triptych.tools.make_model.text import WIDTH

_SIZE: Final[dict[str, Any]] = {"height": 32, "width": 32, "num_inference_steps": 2}
_SAID: Final[dict[str, Any]] = {"prompt": PROMPT, "negative_prompt": "grey", "num_inference_steps": 2}
_MADE: Final[dict[str, Any]] = {**_SIZE, **_SAID, "num_frames": 3}


def samples() -> list[Sample]:
    """Those of this module."""
    moving = {**sd(), "motion_adapter": _motion}
    sparse = {**moving, "controlnet": _sparse}
    video = [frame.resize((32, 32)) for frame in video_frames(3)]
    from_video = {**_SIZE, **_SAID, "video": video, "strength": 0.7}
    zero = {**_SIZE, **_SAID, "video_length": 3, "t0": 1, "t1": 2, "num_inference_steps": 3}
    spatial = {**sd(), "unet": _spatial}
    return [
        Sample("AnimateDiffPipeline", moving, _MADE),
        Sample("AnimateDiffPAGPipeline", moving, _MADE),
        Sample("AnimateDiffControlNetPipeline", moving, {**_MADE, "conditioning_frames": video}),
        Sample(
            "AnimateDiffSDXLPipeline", {**xl(), "motion_adapter": lambda: _motion(block_out_channels=(16, 32))}, _MADE
        ),
        Sample(
            "AnimateDiffSparseControlNetPipeline",
            sparse,
            {**_MADE, "conditioning_frames": video[:1], "controlnet_frame_indices": [0]},
        ),
        Sample("AnimateDiffVideoToVideoPipeline", moving, from_video),
        Sample("AnimateDiffVideoToVideoControlNetPipeline", moving, {**from_video, "conditioning_frames": video}),
        Sample(
            "PIAPipeline",
            {**sd(), "motion_adapter": lambda: _motion(conv_in_channels=9)},
            {**_MADE, "image": input_image()},
        ),
        Sample("TextToVideoSDPipeline", spatial, _MADE),
        Sample("VideoToVideoSDPipeline", spatial, {**_SAID, "video": video, "strength": 0.7}),
        Sample("TextToVideoZeroPipeline", {**sd(), **checked()}, zero),
        Sample("TextToVideoZeroSDXLPipeline", xl(), zero),
        Sample(
            "I2VGenXLPipeline",
            {**sd(), "unet": _from_image, "feature_extractor": text.clip_images},
            {**_MADE, "image": input_image(), "clip_skip": None},
        ),
        Sample(
            "StableVideoDiffusionPipeline",
            {"unet": _stable_video, "vae": _temporal, "scheduler": _continuous, "image_encoder": _large_eye},
            {**_SIZE, "image": input_image(), "num_frames": 3, "decode_chunk_size": 3},
        ),
    ]


def _large_eye() -> Any:
    return text.clip_vision_projection(image_size=224, patch_size=32)


def _motion(**changes: Any) -> MotionAdapter:
    return MotionAdapter(
        **{
            "block_out_channels": (8, 16),
            "motion_layers_per_block": 1,
            "motion_norm_num_groups": 2,
            "motion_num_attention_heads": 2,
            **changes,
        }
    )


def _sparse() -> SparseControlNetModel:
    return SparseControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlockMotion", "CrossAttnDownBlockMotion"),
        cross_attention_dim=WIDTH,
        conditioning_channels=4,
        conditioning_embedding_out_channels=(8, 8),
        norm_num_groups=2,
        attention_head_dim=2,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        use_simplified_condition_embedding=True,
    )


_BLOCKS: Final[dict[str, Any]] = {
    "block_out_channels": (8, 8),
    "layers_per_block": 1,
    "sample_size": 32,
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 2,
}


def _spatial() -> UNet3DConditionModel:
    return UNet3DConditionModel(**_BLOCKS, attention_head_dim=4)


def _from_image() -> I2VGenXLUNet:
    return I2VGenXLUNet(**_BLOCKS, attention_head_dim=4, num_attention_heads=None)


def _stable_video() -> UNetSpatioTemporalConditionModel:
    return UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 32),
        layers_per_block=1,
        sample_size=32,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=48,
        addition_time_embed_dim=16,
    )


def _temporal() -> AutoencoderKLTemporalDecoder:
    return AutoencoderKLTemporalDecoder(
        block_out_channels=[32, 32, 32],
        layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 3,
        latent_channels=4,
    )


def _continuous() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
