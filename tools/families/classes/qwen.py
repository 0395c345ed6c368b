"""Qwen-Image."""

from __future__ import annotations

from typing import Any

from diffusers import QwenImageControlNetModel

from tools.families.case import PROMPT, SMALL, SQUARE, VISION, mask, picture
from tools.families.classes import Sample
from tools.make_model import looking, qwen
from tools.make_model.recipe import Component
from tools.make_model.text import WIDTH

_TEXT: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "grey", "max_sequence_length": 32, **SMALL}
_IMAGE: dict[str, Any] = {**_TEXT, **SQUARE, "image": picture(), "strength": 0.7}
_MASKED: dict[str, Any] = {**_IMAGE, "mask_image": mask()}
_EDIT: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "grey", "num_inference_steps": 2, "image": picture()}


def samples() -> list[Sample]:
    """Those of Qwen-Image and Qwen-Image 2.1."""
    return [
        Sample("QwenImagePipeline", _components(), _TEXT),
        Sample("QwenImageImg2ImgPipeline", _components(), _IMAGE),
        Sample("QwenImageInpaintPipeline", _components(), _MASKED),
        Sample(
            "QwenImageControlNetPipeline", {**_components(), "controlnet": _net}, {**_TEXT, "control_image": picture()}
        ),
        Sample(
            "QwenImageControlNetInpaintPipeline",
            {**_components(), "controlnet": lambda: _net(extra_condition_channels=4)},
            {**_TEXT, **SQUARE, "control_image": picture(), "control_mask": mask()},
        ),
        _editing("QwenImageEditPipeline", qwen.edit().components, {**_EDIT, **SQUARE}),
        _editing(
            "QwenImageEditInpaintPipeline",
            qwen.edit().components,
            {**_EDIT, **SQUARE, "mask_image": mask(), "strength": 0.7},
        ),
        _editing(
            "QwenImageEditPlusPipeline",
            qwen.edit_plus().components,
            {**_EDIT, **SQUARE, "image": [picture(), picture(1)]},
        ),
        _editing(
            "QwenImageLayeredPipeline",
            qwen.layered().components,
            {**_EDIT, "image": picture().convert("RGBA"), "layers": 2},
        ),
        _editing("QwenImage21Pipeline", looking.qwenimage21(turbo=False).components, {"prompt": PROMPT, **SMALL}),
    ]


def _components() -> dict[str, Component | None]:
    made = dict(qwen.qwenimage().components)
    del made["controlnet"]
    return made


def _editing(name: str, components: dict[str, Component | None], inputs: dict[str, Any]) -> Sample:
    return Sample(name, components, inputs, needs=VISION)


def _net(**more: Any) -> QwenImageControlNetModel:
    return QwenImageControlNetModel(
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        **more,
    )
