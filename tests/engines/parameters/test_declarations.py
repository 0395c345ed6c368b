"""What of a pipeline's inputs is public, for every block set and every classic pipeline of the installed diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Literal

import diffusers
import msgspec
import pytest
import torch
from diffusers.image_processor import PipelineImageInput
from PIL import Image

from tests.engines.families import all_families
from triptych.engines.parameters.declarations import KNOWN_KINDS, parameters_of_blocks, parameters_of_call
from triptych.engines.parameters.schema import IMAGE_KINDS, Parameter, ParameterKind
from triptych.engines.partition.blocks import prune, required
from triptych.engines.partition.tasks import required_by
from triptych.tools.families.cases import cases
from triptych.tools.families.rows import blocks_of, pipelines

NOT_PUBLIC = {
    *("latents", "generator", "dtype", "batch_size", "output_type", "num_images_per_prompt", "num_videos_per_prompt"),
    *("prompt_embeds", "image_latents", "conditions", "attention_kwargs", "joint_attention_kwargs"),
}
# Objects of diffusers, which neither JSON nor files can say.
OBJECTS = {"conditions", "reference_conditions", "references", "action"}


def tasks_of(pipeline: str) -> list[str]:
    return [*(blocks_of(pipeline)._workflow_map or ()), "any"]


def public(pipeline: str, task: str, given: Mapping[str, object] | None = None) -> dict[str, Parameter]:
    whole = blocks_of(pipeline)
    found = parameters_of_blocks(prune(whole, task, given), required(whole, task))
    return {parameter.name: parameter for parameter in found}


def kind(hint: Any, name: str = "x", default: Any = None) -> ParameterKind | None:
    """What an input that is declared like this is."""
    declared = SimpleNamespace(name=name, type_hint=hint, default=default, required=False, description="")
    found = parameters_of_blocks(SimpleNamespace(inputs=[declared]))
    return found[0].kind if found else None


@pytest.mark.parametrize("pipeline", all_families(pipelines()))
def test_what_is_public_can_be_said_in_json_and_files(pipeline: str) -> None:
    for task in tasks_of(pipeline):
        found = public(pipeline, task)
        assert (found["prompt"].kind, found["prompt"].required) == (ParameterKind.TEXT, True)
        assert not found.keys() & NOT_PUBLIC
        for item in prune(blocks_of(pipeline), task).inputs:
            if item.name in found and found[item.name].kind not in IMAGE_KINDS:
                words = str(item.type_hint)
                assert "dict" not in words, item.name
                assert "Tensor" not in words or "float" in words, item.name
        for name in found.keys() & KNOWN_KINDS.keys():
            # How many images, and whether a number is whole, a family says.
            kinds = {found[name].kind, KNOWN_KINDS[name]}
            assert len(kinds) == 1 or kinds <= IMAGE_KINDS or kinds == {ParameterKind.INTEGER, ParameterKind.NUMBER}, (
                name
            )
        # They ride in the hello of an instance.
        parameters = tuple(found.values())
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(parameters), type=tuple[Parameter, ...]) == parameters


@pytest.mark.parametrize("name", ["StableVideoDiffusionPipeline", "DDPMPipeline", "MarigoldDepthPipeline"])
def test_a_pipeline_without_a_prompt_asks_for_none(name: str) -> None:
    assert "prompt" not in {parameter.name for parameter in parameters_of_call(getattr(diffusers, name).__call__)}


def test_a_prompt_with_a_default_need_not_be_given() -> None:
    def call(prompt: str = "a cat", negative_prompt: str | None = None) -> None: ...

    assert not any(parameter.required for parameter in parameters_of_call(call))


def test_every_input_of_a_known_request_is_public_and_of_its_kind() -> None:
    for case in cases():
        found = public(case.pipeline, case.task or "any", case.inputs)
        assert not found.keys() & OBJECTS
        for name, value in case.inputs.items():
            # The scale is that of a guider, which is no block.
            if not name.startswith("_") and name not in OBJECTS | {"guidance_scale"}:
                assert name in found, (case.pipeline, case.task, name)
                assert fits(found[name].kind, value), (case.pipeline, case.task, name, found[name].kind)
        lacking = {name for name, item in found.items() if item.required} - case.inputs.keys() - {"prompt"}
        assert not lacking, (case.pipeline, case.task)


def fits(kind: ParameterKind, value: object) -> bool:
    match value:
        case Image.Image():
            return kind in (ParameterKind.IMAGE, ParameterKind.IMAGES)
        case [Image.Image(), *_]:
            return kind in (ParameterKind.IMAGES, ParameterKind.IMAGE_LIST)
        case list():
            return kind is ParameterKind.NUMBERS
        case str():
            return kind is ParameterKind.TEXT
        case int():
            return kind in (ParameterKind.INTEGER, ParameterKind.NUMBER)
    return isinstance(value, float) and kind is ParameterKind.NUMBER


@pytest.mark.parametrize(
    ("pipeline", "task", "needed"),
    [
        ("FluxModularPipeline", "text-to-image", set()),
        ("FluxModularPipeline", "image-to-image", {"image"}),
        ("QwenImageModularPipeline", "inpainting", {"image", "mask_image"}),
        ("StableDiffusionXLModularPipeline", "controlnet_union_text2image", {"control_image", "control_mode"}),
        ("WanImage2VideoModularPipeline", "flf2v", {"image", "last_image"}),
        ("HeliosModularPipeline", "video2video", {"video"}),
        ("LTXModularPipeline", "image-to-video", {"image"}),
        ("MiniMaxH3ModularPipeline", "fl2va", set()),
    ],
)
def test_a_task_needs_the_inputs_that_it_is_chosen_by(pipeline: str, task: str, needed: set[str]) -> None:
    assert {name for name, item in public(pipeline, task).items() if item.required} == needed | {"prompt"}


def test_a_task_takes_only_what_its_own_blocks_take() -> None:
    assert "image" not in public("FluxModularPipeline", "text2image")
    assert "strength" not in public("StableDiffusionXLModularPipeline", "text2image")
    assert "negative_prompt" not in public("FluxModularPipeline", "image2image")
    assert "strength" in public("FluxModularPipeline", "image2image")


@pytest.mark.parametrize(
    ("hint", "expected"),
    [
        (str | list[str] | None, ParameterKind.TEXT),
        (Literal["first", "last"], ParameterKind.TEXT),
        (int | list[int], ParameterKind.INTEGER),
        (float | list[float] | torch.Tensor, ParameterKind.NUMBER),
        (int | float, ParameterKind.NUMBER),
        (bool | None, ParameterKind.BOOLEAN),
        (list[float], ParameterKind.NUMBERS),
        (tuple[int, ...] | list[int], ParameterKind.NUMBERS),
        (tuple[int, int] | None, ParameterKind.PAIR),
        (Image.Image | torch.Tensor, ParameterKind.IMAGE),
        (Image.Image | list[Image.Image], ParameterKind.IMAGES),
        (PipelineImageInput, ParameterKind.IMAGES),
        (list[Image.Image], ParameterKind.IMAGE_LIST),
        (list[PipelineImageInput], ParameterKind.IMAGE_LIST),
        (torch.Tensor | None, None),
        (dict[str, Any], None),
        (list[dict], None),
        (list[list[float]], None),
        (list[torch.Tensor], None),
        (torch.dtype, None),
        (None, None),
    ],
    ids=str,
)
def test_the_declared_type_says_what_an_input_is(hint: object, expected: ParameterKind | None) -> None:
    assert kind(hint) is expected


def test_where_the_type_says_nothing_the_name_does_and_then_the_default() -> None:
    assert kind(None, "image") is ParameterKind.IMAGES
    assert kind(Any, "strength", 1) is ParameterKind.NUMBER
    assert kind(list, "sigmas") is kind(list | tuple, "sigmas") is ParameterKind.NUMBERS
    assert kind(None, "aesthetic_score", 6.0) is ParameterKind.NUMBER
    assert kind(None, "guess_mode", False) is ParameterKind.BOOLEAN
    assert kind(list, "history_sizes", [16, 2, 1]) is ParameterKind.NUMBERS
    assert kind(None, "crops_coords_top_left", (0, 0)) is ParameterKind.PAIR
    assert kind(torch.Tensor, "timesteps") is None, "a type that says something is believed"


def test_some_names_mean_the_same_however_they_are_declared() -> None:
    assert kind(PipelineImageInput, "mask_image") is ParameterKind.IMAGE
    assert kind(torch.Tensor, "mask_image") is ParameterKind.IMAGE
    assert kind(PipelineImageInput, "video") is ParameterKind.IMAGE_LIST
    assert kind(torch.Tensor, "video") is None
    assert kind(int, "num_images_per_prompt", 1) is None, "a request for n images is n units"
    assert kind(int, "seed") is None
    assert kind(bool, "_auto_resize", True) is None
    assert kind(str | list[str], "negative_prompt_embeds") is None, "declared wrongly"


def test_an_image_that_is_changed_or_becomes_a_video_is_one() -> None:
    for pipeline, task, expected in (
        ("Flux2ModularPipeline", "image_conditioned", ParameterKind.IMAGES),
        ("QwenImageEditPlusModularPipeline", "any", ParameterKind.IMAGES),
        ("QwenImageModularPipeline", "image2image", ParameterKind.IMAGE),
        ("StableDiffusionXLModularPipeline", "inpainting", ParameterKind.IMAGE),
        ("LTXModularPipeline", "image2video", ParameterKind.IMAGE),
        ("HeliosModularPipeline", "image2video", ParameterKind.IMAGE),
    ):
        assert public(pipeline, task)["image"].kind is expected, (pipeline, task)


def test_defaults_and_descriptions_come_along() -> None:
    found = public("Ideogram4ModularPipeline", "text2image")
    assert found["num_inference_steps"].default == 48
    schedule = found["guidance_schedule"].default
    assert isinstance(schedule, tuple)
    assert set(schedule) == {7.0, 3.0}
    assert found["height"].default is None
    assert found["height"].description.startswith("The height in pixels")


def classics() -> Iterator[Any]:
    for name in ("FluxPipeline", "FluxFillPipeline", "StableDiffusionInpaintPipeline", "CogVideoXVideoToVideoPipeline"):
        yield getattr(diffusers, name)


def test_classic_pipelines_say_it_in_their_call() -> None:
    flux, fill, inpaint, video = (
        {item.name: item for item in parameters_of_call(cls.__call__, required_by(cls))} for cls in classics()
    )
    assert flux["true_cfg_scale"].kind is flux["guidance_scale"].kind is ParameterKind.NUMBER
    assert (flux["prompt"].required, flux["height"].required) == (True, False)
    assert {"negative_prompt", "sigmas"} <= flux.keys()
    options = {"attention_kwargs", "joint_attention_kwargs"}
    hidden = {"self", "callback_on_step_end", "callback_on_step_end_tensor_inputs", "output_type"}
    assert not flux.keys() & (NOT_PUBLIC - options | hidden)
    assert flux["joint_attention_kwargs"].kind is ParameterKind.JSON
    assert fill["image"].kind is fill["mask_image"].kind is ParameterKind.IMAGE
    assert {name for name, item in inpaint.items() if item.required} == {"prompt", "image", "mask_image"}
    assert video["video"].kind is ParameterKind.IMAGE_LIST


@pytest.mark.parametrize(
    ("pipeline", "name", "kind", "many"),
    [
        ("StableDiffusionGLIGEN", "gligen_phrases", ParameterKind.TEXTS, False),
        ("StableDiffusionGLIGEN", "gligen_boxes", ParameterKind.JSON, False),
        ("StableDiffusionGLIGEN", "negative_prompt", ParameterKind.TEXT, False),
        ("BlipDiffusion", "prompt", ParameterKind.TEXT, False),
        ("HunyuanVideo", "prompt_template", ParameterKind.JSON, False),
        ("StableDiffusionXLControlNetUnion", "control_mode", ParameterKind.INTEGER, True),
        ("StableDiffusionControlNet", "controlnet_conditioning_scale", ParameterKind.NUMBER, True),
        ("StableDiffusionControlNet", "guidance_scale", ParameterKind.NUMBER, False),
        ("AnimateDiffVideoToVideo", "video", ParameterKind.IMAGE_LIST, False),
    ],
)
def test_classic_pipelines_take_what_json_can_say(pipeline: str, name: str, kind: ParameterKind, many: bool) -> None:
    found = {item.name: item for item in parameters_of_call(getattr(diffusers, f"{pipeline}Pipeline").__call__)}
    assert (found[name].kind, found[name].many) == (kind, many)


def test_an_annotation_that_cannot_be_evaluated_spoils_only_itself() -> None:
    def call(self: object, image: NoSuchName = None, height: int = 8) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    found = {item.name: item.kind for item in parameters_of_call(call)}
    assert found == {"image": ParameterKind.IMAGES, "height": ParameterKind.INTEGER}
