"""Qwen-Image."""

from __future__ import annotations

from typing import Any

from diffusers import AutoencoderKLQwenImage, QwenImageControlNetModel, QwenImageTransformer2DModel

from triptych.tools.families.cases import PROMPT, SMALL, SQUARE, VISION, input_image, mask
from triptych.tools.families.classes import Sample
from triptych.tools.make_model import ideogram, qwen, vaes
from triptych.tools.make_model.recipe import Component
from triptych.tools.make_model.text import WIDTH

_TEXT: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "grey", "max_sequence_length": 32, **SMALL}
_IMAGE: dict[str, Any] = {**_TEXT, **SQUARE, "image": input_image(), "strength": 0.7}
_MASKED: dict[str, Any] = {**_IMAGE, "mask_image": mask()}
_EDIT: dict[str, Any] = {"prompt": PROMPT, "negative_prompt": "grey", "num_inference_steps": 2, "image": input_image()}


def samples() -> list[Sample]:
    """Those of Qwen-Image and Qwen-Image 2.1."""
    return [
        Sample("QwenImagePipeline", _components(), _TEXT),
        Sample("QwenImageImg2ImgPipeline", _components(), _IMAGE),
        Sample("QwenImageInpaintPipeline", _components(), _MASKED),
        Sample(
            "QwenImageControlNetPipeline",
            {**_components(), "controlnet": _net},
            {**_TEXT, "control_image": input_image()},
        ),
        Sample(
            "QwenImageControlNetInpaintPipeline",
            {**_components(), "controlnet": lambda: _net(extra_condition_channels=4)},
            {**_TEXT, **SQUARE, "control_image": input_image(), "control_mask": mask()},
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
            {**_EDIT, **SQUARE, "image": [input_image(), input_image(1)]},
        ),
        _editing(
            "QwenImageLayeredPipeline",
            {**qwen.layered().components, "transformer": _layered, "vae": _transparent},
            {**_EDIT, "image": input_image().convert("RGBA"), "layers": 2},
        ),
        _editing("QwenImage21Pipeline", ideogram.qwenimage21(turbo=False).components, {"prompt": PROMPT, **SMALL}),
    ]


def _components() -> dict[str, Component | None]:
    made = dict(qwen.qwenimage().components)
    del made["controlnet"]
    return made


def _editing(name: str, components: dict[str, Component | None], inputs: dict[str, Any]) -> Sample:
    return Sample(name, components, inputs, needs=VISION)


def _net(**more: Any) -> QwenImageControlNetModel:
    return QwenImageControlNetModel(**_transformer(channels=4), **more)


def _layered() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(**_transformer(channels=8), use_layer3d_rope=True, use_additional_t_cond=True)


def _transformer(channels: int) -> dict[str, Any]:
    return {
        "in_channels": 4 * channels,
        "out_channels": channels,
        "num_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6),
    }


def _transparent() -> AutoencoderKLQwenImage:
    # Not with as many channels as a transparent image has: that would be taken for latents.
    return vaes.qwen(channels=4, latents=8)
