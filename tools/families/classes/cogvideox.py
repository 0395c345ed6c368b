"""CogVideoX, ConsisID, CogView and Cosmos."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXTransformer3DModel,
    CogView3PlusTransformer2DModel,
    CogView4Transformer2DModel,
    ConsisIDTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
)
from transformers import GlmConfig, GlmModel

from triptych.tools.families.cases import PROMPT, SIDE, input_image, video_frames
from triptych.tools.families.classes import Sample
from triptych.tools.make_model import classic_pipelines, text, vaes
from triptych.tools.make_model.recipe import Component
from triptych.tools.make_model.text import TEXT_LENGTH, WIDTH

_TEXT: dict[str, Any] = {
    "prompt": PROMPT,
    "negative_prompt": "grey",
    "num_inference_steps": 2,
    "max_sequence_length": TEXT_LENGTH,
}
_VIDEO: dict[str, Any] = {**_TEXT, "height": 32, "width": 32}
_IMAGE: dict[str, Any] = {**_TEXT, "height": SIDE, "width": SIDE}


def samples() -> list[Sample]:
    """Those of CogVideoX, what was made of it, and CogView."""
    return [
        Sample("CogVideoXPipeline", classic_pipelines.cogvideox().components, {**_VIDEO, "num_frames": 5}),
        Sample(
            "CogVideoXImageToVideoPipeline", _video(in_channels=8), {**_VIDEO, "num_frames": 5, "image": input_image()}
        ),
        Sample("CogVideoXVideoToVideoPipeline", _video(), {**_VIDEO, "video": video_frames(5), "strength": 0.8}),
        Sample(
            "CogVideoXFunControlPipeline",
            {**_video(in_channels=8), "scheduler": CogVideoXDDIMScheduler},
            {**_VIDEO, "control_video": video_frames(5)},
        ),
        _consisid("ConsisIDPipeline"),
        _cogview3("CogView3PlusPipeline"),
        _cogview4("CogView4Pipeline", _IMAGE),
        _cogview4("CogView4ControlPipeline", {**_IMAGE, "control_image": input_image()}, in_channels=8),
    ]


def _transformer(**changes: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 8,
        "text_embed_dim": WIDTH,
        "num_layers": 1,
        "sample_width": 8,
        "sample_height": 8,
        "sample_frames": 5,
        "temporal_compression_ratio": 2,
        "max_text_seq_length": TEXT_LENGTH,
        "use_rotary_positional_embeddings": True,
        **changes,
    }


def _video(**changes: Any) -> dict[str, Component | None]:
    made = classic_pipelines.cogvideox().components
    return {**made, "transformer": lambda: CogVideoXTransformer3DModel(**_transformer(**changes))}


def _consisid(name: str) -> Sample:
    components = {
        **classic_pipelines.cogvideox().components,
        "transformer": lambda: ConsisIDTransformer3DModel(
            **_transformer(in_channels=8),
            cross_attn_interval=1,
            is_train_face=True,
            cross_attn_dim_head=8,
            cross_attn_num_heads=1,
            LFE_id_dim=8,
            LFE_vit_dim=8,
            LFE_depth=5,
            LFE_dim_head=8,
            LFE_num_heads=2,
            LFE_num_id_token=1,
            LFE_num_querie=1,
            LFE_output_dim=2 * 2 * 16 // 3,  # Two thirds of the width of the transformer.
            LFE_ff_mult=1,
            LFE_num_scale=1,
        ),
        "scheduler": lambda: CogVideoXDDIMScheduler(),
    }
    face = {"id_vit_hidden": [torch.ones(1, 2, 8)], "id_cond": torch.ones(1, 8)}
    return Sample(name, components, {**_VIDEO, "num_frames": 5, "image": input_image(), **face}, needs=("cv2",))


def _cogview3(name: str) -> Sample:
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.tokenizer(start=False),
        "text_encoder": text.t5,
        "vae": lambda: vaes.kl(shift=None),
        "transformer": lambda: CogView3PlusTransformer2DModel(**_view(), pos_embed_max_size=32, sample_size=16),
        "scheduler": lambda: CogVideoXDDIMScheduler(),
    }
    return Sample(name, components, _IMAGE)


def _cogview4(name: str, inputs: dict[str, Any], **changes: Any) -> Sample:
    components: dict[str, Component | None] = {
        "tokenizer": lambda: text.chat_tokenizer(),
        "text_encoder": lambda: GlmModel(GlmConfig(**text.decoder_config(head_dim=16))),
        "vae": lambda: vaes.kl(shift=None),
        "transformer": lambda: CogView4Transformer2DModel(**_view(**changes)),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
        ),
    }
    return Sample(name, components, inputs)


def _view(**changes: Any) -> dict[str, Any]:
    return {
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "text_embed_dim": WIDTH,
        "time_embed_dim": 8,
        "condition_dim": 4,
        **changes,
    }
