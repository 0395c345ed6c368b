"""The requests that are run: for each family and task the tiny model and the inputs."""

from __future__ import annotations

from typing import Any

from triptych.tools.families.case import (
    PROMPT,
    SIDE,
    SMALL,
    SQUARE,
    VIDEO,
    VISION,
    Case,
    input_image,
    mask,
    video_frames,
)
from triptych.tools.families.video_cases import video_cases
from triptych.tools.make_model import Family

__all__ = ["PROMPT", "Case", "cases"]


def cases() -> tuple[Case, ...]:
    """All requests, by pipeline and task."""
    return (*_flux(), *_wan(), *_qwen(), *_stable(), *video_cases(), *_pictures())


def _flux() -> list[Case]:
    image = {"image": input_image()}
    text = {"max_sequence_length": 512}
    kontext = {**SMALL, "max_sequence_length": 32}
    # It would make the picture as large as those that it was trained with.
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


def _pictures() -> list[Case]:
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
