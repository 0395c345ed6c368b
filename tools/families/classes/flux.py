"""Flux, Flux 2 and VisualCloze."""

from __future__ import annotations

from typing import Any

from diffusers import FluxControlNetModel, FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from transformers import SiglipImageProcessorPil

from triptych.tools.families.cases import PROMPT, SIDE, SMALL, SQUARE, input_image, mask
from triptych.tools.families.classes import Sample
from triptych.tools.make_model import flux, text, vaes
from triptych.tools.make_model.recipe import Component
from triptych.tools.make_model.text import WIDTH

_TEXT: dict[str, Any] = {"prompt": PROMPT, "max_sequence_length": 32}
_IMAGE: dict[str, Any] = {**_TEXT, **SQUARE, "image": input_image(), "strength": 0.7}
_MASKED: dict[str, Any] = {**_IMAGE, "mask_image": mask()}
_CONTROL: dict[str, Any] = {"control_image": input_image(1)}
_CHANGE: dict[str, Any] = {"image": input_image(), "_auto_resize": False, "max_area": SIDE * SIDE}
_NET: dict[str, Any] = {"controlnet_conditioning_scale": 0.7}
# The states of three layers, the last of them the 27th.
_TEXT2: dict[str, Any] = {"prompt": PROMPT, "max_sequence_length": 64, "num_inference_steps": 2}


def samples() -> list[Sample]:
    """Those of Flux and what was made of it."""
    return [
        _flux("FluxPipeline", {**_TEXT, **SMALL}),
        _flux("FluxImg2ImgPipeline", _IMAGE),
        _flux("FluxInpaintPipeline", _MASKED),
        _flux("FluxFillPipeline", {**_MASKED, "strength": 1.0}, extra=4 + 4 * 4),
        _flux("FluxControlPipeline", {**_TEXT, **SMALL, **_CONTROL}, extra=4),
        _flux("FluxControlImg2ImgPipeline", {**_IMAGE, **_CONTROL}, extra=4),
        _flux("FluxControlInpaintPipeline", {**_MASKED, **_CONTROL}, extra=4),
        _net("FluxControlNetPipeline", {**_TEXT, **SMALL, **_CONTROL, **_NET}),
        _net("FluxControlNetImg2ImgPipeline", {**_IMAGE, **_CONTROL, **_NET}),
        _net("FluxControlNetInpaintPipeline", {**_MASKED, **_CONTROL, **_NET}),
        _flux("FluxKontextPipeline", {**_TEXT, **SMALL, **_CHANGE}),
        _flux("FluxKontextInpaintPipeline", {**_MASKED, **_CHANGE, "image_reference": input_image(1)}),
        _redux("FluxPriorReduxPipeline"),
        _cloze("VisualClozeGenerationPipeline", {}),
        _cloze("VisualClozePipeline", {"upsampling_height": SIDE, "upsampling_width": SIDE}),
        _flux2("Flux2Pipeline", {**_TEXT2, "height": SIDE, "width": 48}),
        _klein("Flux2KleinPipeline", {**_TEXT2, "height": SIDE, "width": 48}),
        _klein(
            "Flux2KleinInpaintPipeline",
            {**_TEXT2, "height": SIDE, "width": SIDE, "image": input_image(), "mask_image": mask()},
        ),
        _klein(
            "Flux2KleinKVPipeline", {**_TEXT2, "height": SIDE, "width": SIDE, "image": input_image()}, distilled=True
        ),
    ]


def _flux(name: str, inputs: dict[str, Any], extra: int = 0, **more: Any) -> Sample:
    # `extra` is how many more channels a latent has, before it is patched 2 x 2.
    def transformer() -> FluxTransformer2DModel:
        return FluxTransformer2DModel(**_transformer(in_channels=4 * (4 + extra)))

    return Sample(name, {**_parts(), "transformer": transformer, **more}, inputs)


def _parts() -> dict[str, Component | None]:
    return flux.flux(vaes.kl, guidance_embeds=True).components


def _transformer(**changes: Any) -> dict[str, Any]:
    return {
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": WIDTH,
        "pooled_projection_dim": WIDTH,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
        **changes,
    }


def _net(name: str, inputs: dict[str, Any]) -> Sample:
    shape = _transformer()
    del shape["out_channels"]
    return _flux(name, inputs, controlnet=lambda: FluxControlNetModel(**shape))


def _cloze(name: str, inputs: dict[str, Any]) -> Sample:
    asked = {
        "task_prompt": "Each row is a picture and its lines.",
        "content_prompt": PROMPT,
        # Rows of a question and its answer; the last answer is to be made.
        "image": [[input_image(), input_image(1)], [input_image(2), None]],
        "max_sequence_length": 32,
        "num_inference_steps": 2,
        **inputs,
    }
    return _flux(name, asked, extra=4 + 4 * 4, resolution=32)


def _redux(name: str) -> Sample:
    components: dict[str, Component | None] = {
        "image_encoder": text.siglip_vision,
        "feature_extractor": lambda: SiglipImageProcessorPil(size={"height": 32, "width": 32}),
        "image_embedder": lambda: ReduxImageEncoder(redux_dim=WIDTH, txt_in_features=WIDTH),
    }
    # Without text encoders it has states of the width of the original's.
    read = {part: made for part, made in _parts().items() if part.startswith(("text", "token"))}
    return Sample(name, {**components, **read}, {"image": input_image(), "prompt": PROMPT})


def _flux2(name: str, inputs: dict[str, Any]) -> Sample:
    return Sample(name, flux.flux2().components, inputs)


def _klein(name: str, inputs: dict[str, Any], *, distilled: bool = False) -> Sample:
    return Sample(name, {**flux.klein(distilled=distilled).components, "is_distilled": distilled}, inputs)
