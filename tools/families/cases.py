"""The requests that are run: for each family and task the tiny model and the inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import numpy as np
from PIL import Image

from tools.make_model import Family

PROMPT: Final = "a large red circle on the left of a blue background"
SIDE: Final = 64


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        pipeline: The modular pipeline that it is for.
        task: A workflow of it; "" where it has just one.
        family: The tiny model.
        inputs: Of the request, besides the prompt.
        needs: Python packages that diffusers or transformers imports for it.
    """

    pipeline: str
    task: str
    family: Family
    inputs: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@cache
def picture(seed: int = 0) -> Image.Image:
    """A picture of coloured squares, [64, 64] pixels."""
    squares = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@cache
def mask() -> Image.Image:
    """White where a picture is to be painted anew: its right half."""
    half = np.zeros((SIDE, SIDE), dtype=np.uint8)
    half[:, SIDE // 2 :] = 255
    return Image.fromarray(half)


def film(frames: int) -> list[Image.Image]:
    """A video: a list of pictures."""
    return [picture(number) for number in range(frames)]


_VISION: Final = ("torchvision",)
_SMALL: Final = {"height": SIDE, "width": 48, "num_inference_steps": 3}
_SQUARE: Final = {"height": SIDE, "width": SIDE, "num_inference_steps": 3}
_VIDEO: Final = {**_SQUARE, "num_frames": 5}


def cases() -> tuple[Case, ...]:
    """All requests, by pipeline and task."""
    return (*_flux(), *_wan(), *_qwen(), *_stable(), *_video(), *_pictures())


def _flux() -> list[Case]:
    image = {"image": picture()}
    text = {"max_sequence_length": 512}
    kontext = {**_SMALL, "max_sequence_length": 32}
    # It would make the picture as large as those that it was trained with.
    own_size = {**image, "_auto_resize": False, "max_area": SIDE * SIDE}
    made = [
        Case("FluxModularPipeline", "text2image", Family.FLUX, {**_SMALL, "max_sequence_length": 32}),
        Case("FluxModularPipeline", "image2image", Family.FLUX_KL, {**_SQUARE, **image, "strength": 0.7}),
        Case("FluxKontextModularPipeline", "text2image", Family.FLUX_KONTEXT, kontext),
        Case("FluxKontextModularPipeline", "image_conditioned", Family.FLUX_KONTEXT, {**kontext, **own_size}),
    ]
    for pipeline, family in (
        ("Flux2ModularPipeline", Family.FLUX2),
        ("Flux2KleinModularPipeline", Family.FLUX2_KLEIN),
        ("Flux2KleinBaseModularPipeline", Family.FLUX2_KLEIN_BASE),
    ):
        made.append(Case(pipeline, "text2image", family, {**_SMALL, **text}))
        made.append(Case(pipeline, "image_conditioned", family, {**_SQUARE, **text, **image}))
    return made


def _wan() -> list[Case]:
    text = {"max_sequence_length": 32, "negative_prompt": "grey"}
    image = {"image": picture()}
    follow = {"video": film(5), "mask": [mask()] * 5, "reference_images": [picture(9)]}
    made = [
        Case("WanModularPipeline", "", Family.WAN, {**_VIDEO, **text}),
        Case("WanImage2VideoModularPipeline", "image2video", Family.WAN_I2V, {**_VIDEO, **text, **image}),
        Case(
            "WanImage2VideoModularPipeline",
            "flf2v",
            Family.WAN_FLF2V,
            {**_VIDEO, **text, **image, "last_image": picture(1)},
            _VISION,
        ),
        Case("Wan22ModularPipeline", "", Family.WAN22, {**_VIDEO, **text}),
        Case("Wan22Image2VideoModularPipeline", "", Family.WAN22_I2V, {**_VIDEO, **text, **image}),
        Case("Wan22VaceModularPipeline", "", Family.WAN22_VACE, {**_VIDEO, **text, **follow}),
    ]
    long = {**_SQUARE, "num_frames": 33, "max_sequence_length": 32}
    pyramid = {**long, "pyramid_num_inference_steps_list": [1, 1, 1]}
    del pyramid["num_inference_steps"]
    for pipeline, family, inputs in (
        ("HeliosModularPipeline", Family.HELIOS, long),
        ("HeliosPyramidModularPipeline", Family.HELIOS_PYRAMID, pyramid),
        ("HeliosPyramidDistilledModularPipeline", Family.HELIOS_PYRAMID_DISTILLED, pyramid),
    ):
        made.append(Case(pipeline, "text2video", family, inputs))
        made.append(Case(pipeline, "image2video", family, {**inputs, **image}))
        made.append(Case(pipeline, "video2video", family, {**inputs, "video": film(33)}))
    return made


def _qwen() -> list[Case]:
    image = {"image": picture()}
    paint = {**image, "mask_image": mask()}
    control = {"control_image": picture(2)}
    base = {**_SQUARE, "max_sequence_length": 512, "negative_prompt": "grey"}
    pipeline, family = "QwenImageModularPipeline", Family.QWENIMAGE
    edit = {"num_inference_steps": 1, "negative_prompt": "grey"}
    made = [
        Case(pipeline, "text2image", family, {**base, "width": 48}),
        Case(pipeline, "image2image", family, {**base, **image}),
        Case(pipeline, "inpainting", family, {**base, **paint}),
        Case(pipeline, "controlnet_text2image", family, {**base, **control}),
        Case(pipeline, "controlnet_image2image", family, {**base, **image, **control}),
        Case(pipeline, "controlnet_inpainting", family, {**base, **paint, **control}),
    ]
    pipeline, family = "QwenImageEditModularPipeline", Family.QWENIMAGE_EDIT
    made.append(Case(pipeline, "image_conditioned", family, {**edit, **image}, _VISION))
    made.append(Case(pipeline, "image_conditioned_inpainting", family, {**edit, **paint}, _VISION))
    plus = {**edit, "image": [picture(), picture(1)], "height": SIDE, "width": SIDE}
    made.append(Case("QwenImageEditPlusModularPipeline", "", Family.QWENIMAGE_EDIT_PLUS, plus, _VISION))
    layers = {**edit, "image": picture().convert("RGBA"), "resolution": 640, "layers": 2}
    made.append(Case("QwenImageLayeredModularPipeline", "", Family.QWENIMAGE_LAYERED, layers, _VISION))
    return made


def _stable() -> list[Case]:
    image = {"image": picture(), "strength": 0.7}
    paint = {**image, "mask_image": mask()}
    control = {"control_image": picture(2)}
    base = {**_SQUARE, "negative_prompt": "grey"}
    union = {"control_image": [picture(2)], "control_mode": [1]}
    pipeline, family = "StableDiffusionXLModularPipeline", Family.SDXL
    return [
        Case("StableDiffusion3ModularPipeline", "text2image", Family.SD3, {**base, "width": 48}),
        Case("StableDiffusion3ModularPipeline", "image2image", Family.SD3, {**base, **image}),
        Case(pipeline, "text2image", family, {**base, "width": 48}),
        Case(pipeline, "image2image", family, {**base, **image}),
        Case(pipeline, "inpainting", family, {**base, **paint}),
        Case(pipeline, "controlnet_text2image", family, {**base, **control}),
        Case(pipeline, "controlnet_image2image", family, {**base, **image, **control}),
        Case(pipeline, "controlnet_inpainting", family, {**base, **paint, **control}),
        Case(pipeline, "controlnet_union_text2image", Family.SDXL_UNION, {**base, **union}),
        Case(pipeline, "controlnet_union_image2image", Family.SDXL_UNION, {**base, **image, **union}),
        Case(pipeline, "controlnet_union_inpainting", Family.SDXL_UNION, {**base, **paint, **union}),
    ]


def _video() -> list[Case]:
    image = {"image": picture()}
    text = {"max_sequence_length": 64, "negative_prompt": "grey"}
    frames = {**_SQUARE, "num_frames": 9}
    remembering = {"height": SIDE, "width": SIDE, "num_frames": 9, "sigmas": [1.0, 0.6, 0.3, 0.0], **image}
    glyphs = {**_VIDEO, "prompt": 'a red sign that says "open"', "negative_prompt": "grey"}
    return [
        Case("LTXModularPipeline", "text2video", Family.LTX, {**frames, **text}),
        Case("LTXModularPipeline", "image2video", Family.LTX, {**frames, **text, **image}),
        Case("LTX2ModularPipeline", "text2video", Family.LTX2, {**frames, **text}),
        Case("LTX2ModularPipeline", "image2video", Family.LTX2, {**frames, **text, **image, "image_crf": 0}),
        Case("EchoModularPipeline", "", Family.ECHO, remembering),
        Case("HunyuanVideo15ModularPipeline", "text2video", Family.HUNYUAN_VIDEO15, glyphs),
        Case("HunyuanVideo15ModularPipeline", "image2video", Family.HUNYUAN_VIDEO15, {**glyphs, **image}),
    ]


def _pictures() -> list[Case]:
    image = {"image": picture(), "strength": 0.7}
    text = {"max_sequence_length": 64}
    ideogram = {**_SMALL, "max_sequence_length": 128, "guidance_schedule": [7.0, 7.0, 3.0]}
    return [
        Case("ZImageModularPipeline", "text2image", Family.Z_IMAGE, {**_SMALL, **text}),
        Case("ZImageModularPipeline", "image2image", Family.Z_IMAGE, {**_SQUARE, **text, **image}),
        Case("Ideogram4ModularPipeline", "text2image", Family.IDEOGRAM4, ideogram),
        *_qwen21(),
        Case("Krea2ModularPipeline", "text2image", Family.KREA2, {**_SMALL, "max_sequence_length": 512}),
        Case("Krea2TurboModularPipeline", "text2image", Family.KREA2_TURBO, {**_SMALL, "max_sequence_length": 512}),
        Case(
            "AnimaModularPipeline", "text2image", Family.ANIMA, {**_SMALL, **text, "negative_prompt": "grey"}, _VISION
        ),
        Case("AnimaModularPipeline", "img2img", Family.ANIMA, {**_SQUARE, **text, **image}, _VISION),
        Case("ErnieImageModularPipeline", "text2image", Family.ERNIE_IMAGE, {**_SMALL, "negative_prompt": "grey"}),
    ]


def _qwen21() -> list[Case]:
    made = []
    for pipeline, family, more in (
        ("QwenImage21ModularPipeline", Family.QWENIMAGE21, {"num_inference_steps": 2, "negative_prompt": "grey"}),
        ("QwenImage21TurboModularPipeline", Family.QWENIMAGE21_TURBO, {}),
    ):
        size = {"height": SIDE, "width": SIDE, "output_resolution": SIDE, **more}
        made.append(Case(pipeline, "text2image", family, {**size, "width": 48}, _VISION))
        made.append(Case(pipeline, "image_conditioned", family, {**size, "image": [picture()]}, _VISION))
    return made
