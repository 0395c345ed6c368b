"""The requests that are run: for each family and task the tiny model and the inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import numpy as np
import torch
from diffusers.modular_pipelines.minimax_h3 import (
    MiniMaxH3AudioReference,
    MiniMaxH3ImageReference,
    MiniMaxH3VideoReference,
)
from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import CosmosActionCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition
from PIL import Image

from triptych.tools.make_model import Family

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
def input_image(seed: int = 0) -> Image.Image:
    """Return an image of coloured squares, 64 x 64 pixels."""
    squares = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@cache
def mask() -> Image.Image:
    """Return a mask whose right half is white: the part to be inpainted."""
    half = np.zeros((SIDE, SIDE), dtype=np.uint8)
    half[:, SIDE // 2 :] = 255
    return Image.fromarray(half)


def video_frames(frames: int) -> list[Image.Image]:
    """Return a video, a list of images."""
    return [input_image(number) for number in range(frames)]


VISION: Final = ("torchvision",)
SMALL: Final = {"height": SIDE, "width": 48, "num_inference_steps": 3}
SQUARE: Final = {"height": SIDE, "width": SIDE, "num_inference_steps": 3}
VIDEO: Final = {**SQUARE, "num_frames": 5}


def cases() -> tuple[Case, ...]:
    """Return all requests, by pipeline and task."""
    return (*_flux(), *_wan(), *_qwen(), *_stable(), *_video(), *_images())


def _flux() -> list[Case]:
    image = {"image": input_image()}
    text = {"max_sequence_length": 512}
    kontext = {**SMALL, "max_sequence_length": 32}
    # It would make the image as large as those that it was trained with.
    own_size = {**image, "_auto_resize": False, "max_area": SIDE * SIDE}
    made = [
        Case("FluxModularPipeline", "text2image", Family.FLUX, {**SMALL, "max_sequence_length": 32}),
        Case("FluxModularPipeline", "image2image", Family.FLUX_KL, {**SQUARE, **image, "strength": 0.7}),
        Case("FluxKontextModularPipeline", "text2image", Family.FLUX_KONTEXT, kontext),
        Case("FluxKontextModularPipeline", "image_conditioned", Family.FLUX_KONTEXT, {**kontext, **own_size}),
    ]
    for pipeline, family in (
        ("Flux2ModularPipeline", Family.FLUX2),
        ("Flux2KleinModularPipeline", Family.FLUX2_KLEIN),
        ("Flux2KleinBaseModularPipeline", Family.FLUX2_KLEIN_BASE),
    ):
        made.append(Case(pipeline, "text2image", family, {**SMALL, **text}))
        made.append(Case(pipeline, "image_conditioned", family, {**SQUARE, **text, **image}))
    rewritten = {"num_inference_steps": 3, "max_new_tokens": 8}
    for pipeline, family in (
        ("Flux3ModularPipeline", Family.FLUX3),
        ("Flux3DistilledModularPipeline", Family.FLUX3_DISTILLED),
    ):
        made.append(Case(pipeline, "text2image", family, {**SMALL, **rewritten}, VISION))
        made.append(Case(pipeline, "image_conditioned", family, {**rewritten, **image}, VISION))
    return made


def _wan() -> list[Case]:
    text = {"max_sequence_length": 32, "negative_prompt": "grey"}
    image = {"image": input_image()}
    follow = {"video": video_frames(5), "mask": [mask()] * 5, "reference_images": [input_image(9)]}
    made = [
        Case("WanModularPipeline", "", Family.WAN, {**VIDEO, **text}),
        Case("WanImage2VideoModularPipeline", "image2video", Family.WAN_I2V, {**VIDEO, **text, **image}),
        Case(
            "WanImage2VideoModularPipeline",
            "flf2v",
            Family.WAN_FLF2V,
            {**VIDEO, **text, **image, "last_image": input_image(1)},
            VISION,
        ),
        Case("Wan22ModularPipeline", "", Family.WAN22, {**VIDEO, **text}),
        Case("Wan22Image2VideoModularPipeline", "", Family.WAN22_I2V, {**VIDEO, **text, **image}),
        Case("Wan22VaceModularPipeline", "", Family.WAN22_VACE, {**VIDEO, **text, **follow}),
    ]
    long = {**SQUARE, "num_frames": 33, "max_sequence_length": 32}
    pyramid = {**long, "pyramid_num_inference_steps_list": [1, 1, 1]}
    del pyramid["num_inference_steps"]
    for pipeline, family, inputs in (
        ("HeliosModularPipeline", Family.HELIOS, long),
        ("HeliosPyramidModularPipeline", Family.HELIOS_PYRAMID, pyramid),
        ("HeliosPyramidDistilledModularPipeline", Family.HELIOS_PYRAMID_DISTILLED, pyramid),
    ):
        made.append(Case(pipeline, "text2video", family, inputs))
        made.append(Case(pipeline, "image2video", family, {**inputs, **image}))
        made.append(Case(pipeline, "video2video", family, {**inputs, "video": video_frames(33)}))
    return made


def _qwen() -> list[Case]:
    image = {"image": input_image()}
    paint = {**image, "mask_image": mask()}
    control = {"control_image": input_image(2)}
    base = {**SQUARE, "max_sequence_length": 512, "negative_prompt": "grey"}
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
    made.append(Case(pipeline, "image_conditioned", family, {**edit, **image}, VISION))
    made.append(Case(pipeline, "image_conditioned_inpainting", family, {**edit, **paint}, VISION))
    plus = {**edit, "image": [input_image(), input_image(1)], "height": SIDE, "width": SIDE}
    made.append(Case("QwenImageEditPlusModularPipeline", "", Family.QWENIMAGE_EDIT_PLUS, plus, VISION))
    layers = {**edit, "image": input_image().convert("RGBA"), "resolution": 640, "layers": 2}
    made.append(Case("QwenImageLayeredModularPipeline", "", Family.QWENIMAGE_LAYERED, layers, VISION))
    return made


def _stable() -> list[Case]:
    image = {"image": input_image(), "strength": 0.7}
    paint = {**image, "mask_image": mask(), "padding_mask_crop": 8}
    control = {"control_image": input_image(2)}
    base = {**SQUARE, "negative_prompt": "grey"}
    union = {"control_image": [input_image(2)], "control_mode": [1]}
    made = [
        Case("StableDiffusion3ModularPipeline", "text2image", Family.SD3, {**base, "width": 48}),
        Case("StableDiffusion3ModularPipeline", "image2image", Family.SD3, {**base, **image}),
    ]
    # The class that the index names would guide less where nothing is said.
    tasks: dict[str, dict[str, Any]] = {
        "text2image": {"guidance_scale": 7.5},
        "image2image": image,
        "inpainting": paint,
    }
    controls: dict[str, tuple[Family, dict[str, Any]]] = {
        "": (Family.SDXL, {}),
        "controlnet_": (Family.SDXL, control),
        "controlnet_union_": (Family.SDXL_UNION, union),
    }
    adapters: dict[str, dict[str, Any]] = {"": {}, "ip_adapter_": {"ip_adapter_image": input_image(3)}}
    for adapter, shown in adapters.items():
        for kind, (family, control) in controls.items():
            for task, given in tasks.items():
                inputs = {**base, **given, **control, **shown}
                made.append(Case("StableDiffusionXLModularPipeline", f"{adapter}{kind}{task}", family, inputs))
    return made


def _images() -> list[Case]:
    image = {"image": input_image(), "strength": 0.7}
    text = {"max_sequence_length": 64}
    ideogram = {**SMALL, "max_sequence_length": 128, "guidance_schedule": [7.0, 7.0, 3.0]}
    return [
        Case("ZImageModularPipeline", "text2image", Family.Z_IMAGE, {**SMALL, **text}),
        Case("ZImageModularPipeline", "image2image", Family.Z_IMAGE, {**SQUARE, **text, **image}),
        Case("Ideogram4ModularPipeline", "text2image", Family.IDEOGRAM4, ideogram),
        *_qwen21(),
        Case("Krea2ModularPipeline", "text2image", Family.KREA2, {**SMALL, "max_sequence_length": 512}),
        Case("Krea2TurboModularPipeline", "text2image", Family.KREA2_TURBO, {**SMALL, "max_sequence_length": 512}),
        Case("AnimaModularPipeline", "text2image", Family.ANIMA, {**SMALL, **text, "negative_prompt": "grey"}, VISION),
        Case("AnimaModularPipeline", "img2img", Family.ANIMA, {**SQUARE, **text, **image}, VISION),
        Case("ErnieImageModularPipeline", "text2image", Family.ERNIE_IMAGE, {**SMALL, "negative_prompt": "grey"}),
    ]


def _qwen21() -> list[Case]:
    made = []
    for pipeline, family, more in (
        ("QwenImage21ModularPipeline", Family.QWENIMAGE21, {"num_inference_steps": 2, "negative_prompt": "grey"}),
        ("QwenImage21TurboModularPipeline", Family.QWENIMAGE21_TURBO, {}),
    ):
        size = {"height": SIDE, "width": SIDE, "output_resolution": SIDE, **more}
        made.append(Case(pipeline, "text2image", family, {**size, "width": 48}, VISION))
        made.append(Case(pipeline, "image_conditioned", family, {**size, "image": [input_image()]}, VISION))
    return made


def _video() -> list[Case]:
    """Return the videos of all families but Wan."""
    image = {"image": input_image()}
    text = {"max_sequence_length": 64, "negative_prompt": "grey"}
    frames = {**SQUARE, "num_frames": 9}
    remembering = {"height": SIDE, "width": SIDE, "num_frames": 9, "sigmas": [1.0, 0.6, 0.3, 0.0], **image}
    glyphs = {**VIDEO, "prompt": 'a red sign that says "open"', "negative_prompt": "grey"}
    return [
        Case("LTXModularPipeline", "text2video", Family.LTX, {**frames, **text}),
        Case("LTXModularPipeline", "image2video", Family.LTX, {**frames, **text, **image}),
        *_ltx2("LTX2ModularPipeline", Family.LTX2),
        *_ltx2("LTX25ModularPipeline", Family.LTX25),
        Case("EchoModularPipeline", "", Family.ECHO, remembering),
        Case("HunyuanVideo15ModularPipeline", "text2video", Family.HUNYUAN_VIDEO15, glyphs),
        Case("HunyuanVideo15ModularPipeline", "image2video", Family.HUNYUAN_VIDEO15, {**glyphs, **image}),
        *_cosmos3(),
        *_animate2(),
        *_minimax(),
    ]


def _ltx2(pipeline: str, family: Family) -> list[Case]:
    text = {**SQUARE, "max_sequence_length": 64, "negative_prompt": "grey"}
    frames = {**text, "num_frames": 9}
    # The later one guesses how many frames it takes, if it is not told.
    guessed = {**text, "min_seconds": 0.3, "max_seconds": 0.8} if family is Family.LTX25 else frames
    conditions = [LTX2VideoCondition(input_image()), LTX2VideoCondition(video_frames(8), index=1, strength=0.5)]
    references = [LTX2ReferenceCondition(video_frames(9), strength=0.8)]
    return [
        Case(pipeline, "text2video", family, guessed),
        Case(pipeline, "image2video", family, {**frames, "image": input_image()}),
        Case(pipeline, "condition", family, {**frames, "conditions": conditions}),
        Case(pipeline, "in_context", family, {**frames, "reference_conditions": references}),
    ]


def _animate2() -> list[Case]:
    # The frames are more than one segment has.
    moved = {**SQUARE, "image": input_image(), "driving_video": video_frames(8), "segment_frame_length": 5}
    text = {"max_sequence_length": 64}
    return [
        Case("WanAnimate2ModularPipeline", "", Family.WAN_ANIMATE2, {**moved, **text, "negative_prompt": "grey"}),
        Case("WanAnimate2DistilledModularPipeline", "", Family.WAN_ANIMATE2_DISTILLED, {**moved, **text}),
    ]


def _cosmos3() -> list[Case]:
    omni, distilled = "Cosmos3OmniModularPipeline", "Cosmos3DistilledModularPipeline"
    size = {"height": SIDE, "width": 48}
    tasks: dict[str, dict[str, Any]] = {
        "text2image": {**size, "num_frames": 1},
        "text2video": {**size, "num_frames": 5},
        "image2video": {**size, "num_frames": 5, "image": input_image()},
        "video2video": {**size, "num_frames": 9, "video": video_frames(5)},
    }
    guided = {"num_inference_steps": 3, "negative_prompt": "grey"}
    made = [Case(distilled, task, Family.COSMOS3_DISTILLED, inputs) for task, inputs in tasks.items()]
    made += [Case(omni, task, Family.COSMOS3, {**inputs, **guided}) for task, inputs in tasks.items()]
    made += [
        Case(omni, f"{task}_with_sound", Family.COSMOS3, {**inputs, **guided})
        for task, inputs in tasks.items()
        if task != "text2image"
    ]
    sight: dict[str, dict[str, Any]] = {
        "policy": {"image": input_image()},
        "forward_dynamics": {"image": input_image(), "raw_actions": torch.linspace(-1, 1, 8).reshape(4, 2)},
        "inverse_dynamics": {"video": video_frames(5)},
    }
    for mode, seen in sight.items():
        action = CosmosActionCondition(mode=mode, chunk_size=4, domain_name="pusht", resolution_tier=256, **seen)
        made.append(Case(omni, f"action_{mode}", Family.COSMOS3, {**guided, "action": action}))
    return made


def _minimax() -> list[Case]:
    pipeline, family = "MiniMaxH3ModularPipeline", Family.MINIMAX_H3
    base = {"height": 32, "width": 48, "num_frames": 124, "num_inference_steps": 2}
    sound = torch.sin(torch.linspace(0, 300, 800)).repeat(2, 1)
    references = [
        MiniMaxH3ImageReference(input_image()),
        MiniMaxH3VideoReference(video_frames(12), fps=12.0, audio=sound, sample_rate=400),
        MiniMaxH3AudioReference(sound, sample_rate=400),
    ]
    # More than fits into one of its windows.
    song = {"lyrics": "[verse]\nOh ship\n", "audio_duration": 4.2, "num_inference_steps": 2}
    return [
        Case(pipeline, "t2va", family, base, VISION),
        Case(pipeline, "fl2va", family, {**base, "image": input_image(), "last_image": input_image(1)}, VISION),
        Case(pipeline, "ref2va", family, {**base, "references": references}, VISION),
        Case("MiniMaxMusic3ModularPipeline", "", Family.MINIMAX_MUSIC3, song),
    ]
