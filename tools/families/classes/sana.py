"""Sana, PixArt and Lumina."""

from __future__ import annotations

from typing import Any

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
    SanaControlNetModel,
    SanaTransformer2DModel,
    SanaVideoTransformer3DModel,
    SCMScheduler,
)
from transformers import Gemma2Config, Gemma2Model, GemmaConfig, GemmaModel

from triptych.tools.families.cases import PROMPT, SIDE, input_image
from triptych.tools.families.classes import Sample
from triptych.tools.make_model import classic_pipelines, text, vaes
from triptych.tools.make_model.recipe import Component
from triptych.tools.make_model.text import TEXT_LENGTH, WIDTH

_TEXT: dict[str, Any] = {
    "prompt": PROMPT,
    "height": SIDE,
    "width": SIDE,
    "num_inference_steps": 2,
    "max_sequence_length": TEXT_LENGTH,
}
_BINNED: dict[str, Any] = {**_TEXT, "use_resolution_binning": False, "clean_caption": False}
_GUIDED: dict[str, Any] = {**_BINNED, "negative_prompt": "grey"}
_VIDEO: dict[str, Any] = {**_GUIDED, "height": 32, "width": 32, "frames": 5}


def samples() -> list[Sample]:
    """Those of all three."""
    return [
        Sample("SanaPipeline", classic_pipelines.sana().components, _GUIDED),
        Sample(
            "SanaPAGPipeline",
            {**classic_pipelines.sana().components, "scheduler": FlowMatchEulerDiscreteScheduler},
            {**_GUIDED, "pag_scale": 2.0},
        ),
        Sample(
            "SanaControlNetPipeline",
            {**classic_pipelines.sana().components, "transformer": _two, "controlnet": _net},
            {**_GUIDED, "control_image": input_image()},
        ),
        Sample("SanaSprintPipeline", _sprint(), _BINNED),
        Sample("SanaSprintImg2ImgPipeline", _sprint(), {**_BINNED, "image": input_image(), "strength": 0.5}),
        Sample("SanaVideoPipeline", {**_video(), "scheduler": _dpm}, _VIDEO),
        Sample("SanaImageToVideoPipeline", _video(), {**_VIDEO, "image": input_image()}),
        Sample("PixArtSigmaPipeline", classic_pipelines.pixart().components, _GUIDED),
        Sample("PixArtAlphaPipeline", classic_pipelines.pixart().components, _GUIDED),
        Sample(
            "PixArtSigmaPAGPipeline",
            {**classic_pipelines.pixart().components, "transformer": lambda: classic_pipelines.pixart_transformer(2)},
            {**_GUIDED, "pag_scale": 2.0},
        ),
        _lumina("LuminaPipeline"),
        _lumina2("Lumina2Pipeline"),
    ]


def _transformer(**changes: Any) -> dict[str, Any]:
    return {
        "patch_size": 1,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": WIDTH,
        "caption_channels": WIDTH,
        "sample_size": 16,
        **changes,
    }


def _two() -> SanaTransformer2DModel:
    # The control begins at the second layer.
    return SanaTransformer2DModel(**_transformer(num_layers=2))


def _net() -> SanaControlNetModel:
    return SanaControlNetModel(**_transformer())


def _sprint() -> dict[str, Component | None]:
    return {
        **classic_pipelines.sana().components,
        "transformer": lambda: SanaTransformer2DModel(
            **_transformer(qk_norm="rms_norm_across_heads", guidance_embeds=True)
        ),
        "scheduler": lambda: SCMScheduler(),
    }


def _video() -> dict[str, Component | None]:
    return {
        **classic_pipelines.sana().components,
        "transformer": lambda: SanaVideoTransformer3DModel(
            **_transformer(
                patch_size=(1, 2, 2),
                attention_head_dim=12,
                cross_attention_head_dim=12,
                cross_attention_dim=24,
                sample_size=8,
                qk_norm="rms_norm_across_heads",
                rope_max_seq_len=32,
            )
        ),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=8.0),
        "vae": vaes.wan_full,
    }


def _dpm() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)


def _lumina(name: str) -> Sample:
    components: dict[str, Component | None] = {
        **_lumina_parts(),
        "transformer": lambda: LuminaNextDiT2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            hidden_size=WIDTH,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=16,
            cross_attention_dim=WIDTH,
        ),
        "text_encoder": lambda: GemmaModel(GemmaConfig(**text.decoder_config(head_dim=16))),
    }
    return Sample(name, components, {**_TEXT, "negative_prompt": "grey", "clean_caption": False})


def _lumina2(name: str) -> Sample:
    components: dict[str, Component | None] = {
        **_lumina_parts(),
        "transformer": lambda: Lumina2Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            hidden_size=WIDTH,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=2,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(512, 64, 64),
            cap_feat_dim=WIDTH,
        ),
        "text_encoder": lambda: Gemma2Model(Gemma2Config(**text.decoder_config(head_dim=16))),
    }
    return Sample(name, components, {**_TEXT, "negative_prompt": "grey", "max_sequence_length": 256})


def _lumina_parts() -> dict[str, Component | None]:
    return {
        "tokenizer": lambda: text.tokenizer(start=False, length=256),
        "vae": lambda: vaes.kl(),
        "scheduler": lambda: FlowMatchEulerDiscreteScheduler(shift=6.0),
    }
