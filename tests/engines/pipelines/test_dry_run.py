"""The smallest request that a model says it takes."""

from __future__ import annotations

from PIL import Image

from triptych.engines.parameters.schema import Parameter, ParameterKind, Signature
from triptych.engines.parameters.serving_config import ServingConfig
from triptych.engines.pipelines.dry_run import tiny_inputs

VIDEO = Signature((
    Parameter("prompt", ParameterKind.TEXT),
    Parameter("height", ParameterKind.INTEGER, multiple_of=48),
    Parameter("width", ParameterKind.INTEGER),
    Parameter("num_frames", ParameterKind.INTEGER, 81, every=4),
    Parameter("num_inference_steps", ParameterKind.INTEGER, 50),
    Parameter("image", ParameterKind.IMAGES, required=True),
    Parameter("mask_image", ParameterKind.IMAGE, required=True),
    Parameter("video", ParameterKind.IMAGE_LIST, required=True),
    Parameter("last_image", ParameterKind.IMAGE),
))  # fmt: skip


def test_sizes_steps_and_frames_are_the_least_that_are_taken_and_what_is_required_is_there() -> None:
    serving_config = ServingConfig(
        defaults={"guidance_scale": 2.0, "num_inference_steps": 4}, ranges={"width": (128, 512)}
    )
    made = tiny_inputs(VIDEO, serving_config)
    numbers = {name: value for name, value in made.items() if isinstance(value, int)}
    assert numbers == {"height": 96, "width": 128, "num_frames": 5, "num_inference_steps": 2}
    assert made.keys() - numbers.keys() == {"prompt", "image", "mask_image", "video"}
    image, mask, video = made["image"], made["mask_image"], made["video"]
    assert isinstance(image, Image.Image)
    assert (image.mode, image.size) == ("RGB", (128, 96))
    assert isinstance(mask, Image.Image)
    assert mask.mode == "L"
    assert isinstance(video, list)
    assert tiny_inputs(VIDEO, serving_config, 256)["num_frames"] == 17
    assert tiny_inputs(VIDEO, serving_config, minimal_steps=False)["num_inference_steps"] == 4


def test_the_serving_config_keeps_to_the_steps_that_a_model_was_distilled_for() -> None:
    taken = Signature(
        (Parameter("num_inference_steps", ParameterKind.INTEGER), Parameter("height", ParameterKind.INTEGER))
    )
    ranges = {"num_inference_steps": (1.0, 1.0), "height": (64.0, 64.0, 8.0)}
    assert tiny_inputs(taken, ServingConfig(ranges=ranges)) == {"num_inference_steps": 1, "height": 64}
