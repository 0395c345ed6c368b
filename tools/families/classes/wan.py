"""Wan and what was made of it: SkyReels V2, ChronoEdit, Lucy, AnyFlow and Helios."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AnyFlowFARTransformer3DModel,
    AnyFlowTransformer3DModel,
    ChronoEditTransformer3DModel,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

from triptych.tools.families.cases import PROMPT, VIDEO, input_image, mask, video_frames
from triptych.tools.families.classes import Sample
from triptych.tools.make_model import text, vaes, wan
from triptych.tools.make_model.recipe import Component
from triptych.tools.make_model.text import WIDTH

_TEXT: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "grey", "max_sequence_length": 32}
_SMALL: dict[str, Any] = {**_TEXT, "height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2}
_SMALL_OF_FILM = {name: value for name, value in _SMALL.items() if name != "num_frames"}
# Latents, a mask of as many channels as a latent has frames, and the image's latents.
_SEEING = {"in_channels": 4 + 4 + 4, "image_dim": WIDTH, "added_kv_proj_dim": 24}
_FORCING: dict[str, Any] = {**_SMALL, "num_frames": 9, "base_num_frames": 9, "ar_step": 0}


def samples() -> list[Sample]:
    """Those of Wan, and of others with its VAE."""
    return [
        Sample("WanPipeline", wan.t2v().components, {**_TEXT, **VIDEO}),
        Sample("WanImageToVideoPipeline", wan.i2v().components, {**_TEXT, **VIDEO, "image": input_image()}),
        Sample(
            "WanVideoToVideoPipeline",
            _parts(lambda: WanTransformer3DModel(**_transformer())),
            {**_SMALL_OF_FILM, "video": video_frames(5)},
        ),
        _vace("WanVACEPipeline"),
        _animate("WanAnimatePipeline"),
        Sample(
            "LucyEditPipeline",
            _parts(lambda: WanTransformer3DModel(**_transformer(in_channels=8)), transformer_2=None),
            {**_SMALL, "video": video_frames(5)},
        ),
        Sample(
            "ChronoEditPipeline",
            {
                **_parts(lambda: ChronoEditTransformer3DModel(**_transformer(**_SEEING))),
                "image_encoder": text.clip_vision,
                "image_processor": text.clip_images,
            },
            {**_SMALL, "image": input_image()},
        ),
        Sample(
            "AnyFlowPipeline",
            {**_parts(lambda: AnyFlowTransformer3DModel(**_flow_map())), "scheduler": _flow_map_scheduler},
            {**_SMALL, "guidance_scale": 3.0},
        ),
        Sample(
            "AnyFlowFARPipeline",
            {
                **_parts(
                    lambda: AnyFlowFARTransformer3DModel(
                        **_flow_map(), compressed_patch_size=(1, 4, 4), chunk_partition=(1, 1, 1)
                    )
                ),
                "scheduler": _flow_map_scheduler,
            },
            {**_SMALL, "num_frames": 9, "guidance_scale": 3.0},
        ),
        _skyreels("SkyReelsV2Pipeline", _SMALL),
        _skyreels_of_picture("SkyReelsV2ImageToVideoPipeline"),
        _skyreels("SkyReelsV2DiffusionForcingPipeline", _FORCING),
        _skyreels("SkyReelsV2DiffusionForcingImageToVideoPipeline", {**_FORCING, "image": input_image()}),
        _skyreels(
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
            {**_FORCING, "video": video_frames(5), "num_frames": 13, "overlap_history": 5},
        ),
        Sample(
            "HeliosPipeline", wan.helios("HeliosPipeline", wan.helios_flat).components, {**_SMALL, "num_frames": 33}
        ),
        Sample(
            "HeliosPyramidPipeline",
            wan.helios("HeliosPyramidPipeline", wan.helios_pyramid).components,
            {
                **{name: value for name, value in _SMALL.items() if name != "num_inference_steps"},
                "height": 64,
                "width": 64,
                "num_frames": 33,
                "pyramid_num_inference_steps_list": [1, 1, 1],
            },
        ),
    ]


def _transformer(**changes: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": WIDTH,
        "freq_dim": WIDTH,
        "ffn_dim": WIDTH,
        "num_layers": 2,
        "rope_max_seq_len": 32,
        **changes,
    }


def _parts(transformer: Component, **more: Component | None) -> dict[str, Component | None]:
    return {
        "tokenizer": lambda: text.tokenizer(start=False),
        "text_encoder": text.umt5,
        "transformer": transformer,
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=5.0),
        "vae": vaes.wan_full,
        **more,
    }


def _vace(name: str) -> Sample:
    # Twice the latents of the video, and a mask of as many channels as a latent has pixels.
    changes = {"vace_layers": [0, 1], "vace_in_channels": 2 * 4 + 8 * 8}
    components = _parts(lambda: WanVACETransformer3DModel(**_transformer(**changes)), transformer_2=None)
    follow = {"video": video_frames(5), "mask": [mask()] * 5, "reference_images": [input_image(9)]}
    return Sample(name, components, {**_SMALL, **follow})


def _animate(name: str) -> Sample:
    components = _parts(
        lambda: WanAnimateTransformer3DModel(
            **_transformer(in_channels=4 + 4 + 4, image_dim=WIDTH, added_kv_proj_dim=24),
            latent_channels=4,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=16,
            face_encoder_hidden_dim=16,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        image_encoder=text.clip_vision,
        image_processor=text.clip_images,
    )
    faces = [frame.resize((16, 16)) for frame in video_frames(5)]
    inputs = {**_SMALL_OF_FILM, "image": input_image(), "pose_video": video_frames(5), "face_video": faces}
    return Sample(name, components, {**inputs, "segment_frame_length": 5})


def _flow_map() -> dict[str, Any]:
    return {**_transformer(), "gate_value": 0.25, "deltatime_type": "r"}


def _flow_map_scheduler() -> FlowMapEulerDiscreteScheduler:
    return FlowMapEulerDiscreteScheduler(num_train_timesteps=1000, shift=5.0)


def _skyreels(name: str, inputs: dict[str, Any]) -> Sample:
    return Sample(name, _skyreels_parts(), inputs)


def _skyreels_of_picture(name: str) -> Sample:
    eyes: dict[str, Component | None] = {
        "image_encoder": text.clip_vision_projection,
        "image_processor": text.clip_images,
    }
    return Sample(name, {**_skyreels_parts(**_SEEING), **eyes}, {**_SMALL, "image": input_image()})


def _skyreels_parts(**changes: Any) -> dict[str, Component | None]:
    return {
        **_parts(lambda: SkyReelsV2Transformer3DModel(**_transformer(**changes))),
        "scheduler": lambda: UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
    }
