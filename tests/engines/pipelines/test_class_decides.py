"""The class that a model's index names decides what it is served as, and what comes out is that of the class's kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.engines.classic_models import finish
from tests.engines.families import all_families
from tests.engines.results import media, same, seeded_generator
from triptych.engines.model_options import ModelOptions
from triptych.engines.parameters.declarations import parameters_of_blocks
from triptych.engines.parameters.media import medium_of, results_of
from triptych.engines.parameters.schema import Task
from triptych.engines.parameters.serving_config import SERVING_CONFIG_NAME, ServingConfig
from triptych.engines.parameters.validation import ParameterError, check_task
from triptych.engines.partition.blocks import (
    NoWorkflowError,
    branch_inputs,
    choose_tasks,
    load_modular_partition,
    modular_class,
    prune,
    unused_inputs,
)
from triptych.engines.partition.strategy import PartitionStrategy, describe_serving, strategy_for, tasks_of
from triptych.engines.partition.tasks import class_tasks, classic_class, requirements_of
from triptych.engines.pipelines.pipeline import InputError, StagePipeline
from triptych.engines.stages import ModelError, Stage
from triptych.tools.families.cases import input_image, mask
from triptych.tools.families.compare import SEED, run_reference
from triptych.tools.families.rows import blocks_of, pipelines

CPU = torch.device("cpu")
SMALL = {"prompt": "a red ship", "height": 64, "width": 64, "num_inference_steps": 3}
START = {"image": input_image(), "strength": 0.7}
PAINT = {**START, "mask_image": mask()}


def chosen(name: str, *named: str, **more: Any) -> tuple[str, ...]:
    index = {"_class_name": f"{name}Pipeline", **more}
    found = modular_class(index)
    assert found is not None
    return choose_tasks(blocks_of(found.__name__), named, requirements_of(classic_class(index)))


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("Flux", "text2image"),
        ("FluxImg2Img", "image2image"),
        ("FluxInpaint", ""),
        ("FluxControlNet", ""),
        ("FluxKontext", "image_conditioned text2image"),
        ("StableDiffusion3Img2Img", "image2image"),
        ("StableDiffusion3Inpaint", ""),
        ("StableDiffusionXL", "text2image"),
        ("StableDiffusionXLImg2Img", "image2image"),
        ("StableDiffusionXLInpaint", "inpainting"),
        ("StableDiffusionXLControlNet", "controlnet_text2image"),
        ("StableDiffusionXLControlNetInpaint", "controlnet_inpainting"),
        ("StableDiffusionXLControlNetUnionImg2Img", "controlnet_union_image2image"),
        ("QwenImageEditInpaint", "image_conditioned_inpainting"),
        ("QwenImageControlNet", "controlnet_text2image"),
        ("QwenImageControlNetInpaint", ""),
        ("LTX2ImageToVideo", "image2video"),
        ("LTX2", "text2video"),
        ("WanImageToVideo", "image2video flf2v"),
        ("WanVideoToVideo", ""),
        ("HunyuanVideo15ImageToVideo", "image2video"),
        ("Helios", "text2video image2video video2video"),
    ],
)
def test_a_class_has_the_tasks_that_its_inputs_lead_to_or_the_blocks_have_none(name: str, tasks: str) -> None:
    if not tasks:
        with pytest.raises(NoWorkflowError):
            chosen(name)
        return
    assert chosen(name) == tuple(tasks.split())


def test_any_leaves_out_what_no_request_can_ask_for() -> None:
    assert chosen("LTX2", "any") == ("text2video", "image2video"), "conditions are no parameter"
    adapters = [name for name in chosen("StableDiffusionXL", "any") if "ip_adapter" in name]
    assert not adapters, "each request would have to show an image"
    whole = blocks_of("StableDiffusionXLModularPipeline")
    assert choose_tasks(whole, ("any",), missing={"controlnet"}) == ("text2image", "image2image", "inpainting")
    with pytest.raises(ModelError, match="cannot be served beside others"):
        choose_tasks(whole, ("text2image", "ip_adapter_text2image"))


def test_a_list_of_tasks_keeps_what_they_need_and_no_more() -> None:
    whole = blocks_of("StableDiffusionXLModularPipeline")
    both = prune(whole, ["text-to-image", "inpainting"])
    assert "controlnet" not in both.component_names
    assert {"mask_image", "padding_mask_crop"} <= set(both.input_names)
    assert "control_image" not in both.input_names


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("StableDiffusionImg2Img", [("image2image", {"image", "prompt"})]),
        ("StableDiffusionControlNet", [("controlnet_text2image", {"image", "prompt"})]),
        (
            "StableDiffusion3ControlNetInpainting",
            [("controlnet_text2image", {"control_image", "control_mask", "prompt"})],
        ),
        ("FluxInpaint", [("inpainting", {"image", "mask_image", "prompt"})]),
        ("GlmImage", [("text2image", {"prompt"}), ("image2image", {"image", "prompt"})]),
        ("StableVideoDiffusion", [("image2video", {"image"})]),
        ("DDPM", [("unconditional_image", set())]),
        ("AudioLDM2", [("text2audio", {"prompt"})]),
        ("AnimateDiffVideoToVideo", [("video2video", {"prompt", "video"})]),
    ],
)
def test_the_task_of_a_class_without_blocks_is_named_by_what_it_needs(
    name: str, tasks: list[tuple[str, set[str]]]
) -> None:
    cls = getattr(diffusers, f"{name}Pipeline")
    found = class_tasks(cls, medium_of(results_of(cls.__call__)))
    assert [(task.name, set(task.requires)) for task in found] == tasks


def leaves(blocks: Any, **inputs: Any) -> list[type]:
    return [type(block) for block in blocks.get_execution_blocks(**inputs).sub_blocks.values()]


@pytest.mark.parametrize("pipeline", all_families(pipelines()))
def test_no_input_that_a_task_takes_leads_to_a_block_that_was_cut_away(pipeline: str) -> None:
    blocks = blocks_of(pipeline)
    for task, inputs in (blocks._workflow_map or {}).items():
        kept = prune(blocks, task)
        triggers = inputs[0] if isinstance(inputs, tuple) else inputs
        assert leaves(kept, **triggers) == leaves(blocks, **triggers)
        public = {parameter.name for parameter in parameters_of_blocks(kept)}
        for name in (public & branch_inputs(blocks)) - triggers.keys():
            assert leaves(kept, **triggers, **{name: True}) == leaves(blocks, **triggers, **{name: True}), (task, name)


def test_inputs_that_blocks_read_only_to_check_them_are_no_parameters(models: Callable[[str], Path]) -> None:
    unread = {
        name: unused_inputs(blocks_of(name)) & {item.name for item in parameters_of_blocks(blocks_of(name))}
        for name in ("FluxModularPipeline", "StableDiffusion3ModularPipeline", "StableDiffusionXLModularPipeline")
    }
    assert list(unread.values()) == [{"prompt_2"}, set(), set()]
    with pytest.raises(InputError, match="takes no prompt_2"):
        load(models("flux"), Stage.ENCODER).encode({"prompt": "a ship", "prompt_2": "a boat"}, 1)


def test_a_request_that_is_for_no_task_is_refused_in_words() -> None:
    text = Task("text2image", ("prompt",), ("prompt",))
    paint = Task("inpainting", ("image", "mask_image", "prompt"), ("image", "mask_image", "prompt"))
    film = Task("video2video", ("prompt", "video"), ("prompt", "video"))
    tasks = (text, paint, film)
    for fits in ({}, {"image": 1, "mask_image": 1}, {"video": 1}, {"image": None, "mask_image": False}):
        check_task({"prompt": "x", **fits}, tasks)
        assert ServingConfig().apply({"prompt": "x"}, tasks=tasks) == {"prompt": "x"}
    listed = r"text2image \(prompt\), inpainting \(image, mask_image, prompt\), video2video \(prompt, video\)"
    with pytest.raises(ParameterError, match=rf"^mask_image is required beside image, prompt: .*{listed}\."):
        check_task({"prompt": "x", "image": 1}, tasks)
    with pytest.raises(ParameterError, match=r"^video cannot be given beside image, mask_image, prompt: "):
        check_task({"prompt": "x", "image": 1, "mask_image": 1, "video": 1}, tasks)


# Models as their folders say --------------------------------------------------------------------------------------


def load(model: Path, *stages: Stage, route: str = "", task: str | tuple[str, ...] = "") -> StagePipeline:
    options = ModelOptions(route=route, task=task)
    return StagePipeline.load(model, stages or tuple(Stage), dtype=torch.float32, device=CPU, options=options)


def made(model: Path, inputs: dict[str, Any], *, route: str = "", task: str | tuple[str, ...] = "") -> Any:
    """What two processes make that share no component but those that both need."""
    first, last = (load(model, *stages, route=route, task=task) for stages in ((Stage.ENCODER,), list(Stage)[1:]))
    return media(last.decode(finish(last.denoise(first.encode(inputs, SEED)))))


@pytest.fixture
def folder(models: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of a tiny model without a serving config, whose index names another class."""

    def copied(family: str, name: str, **changes: Any) -> Path:
        model = Path(shutil.copytree(models(family), tmp_path / name))
        (model / SERVING_CONFIG_NAME).unlink()
        path = model / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": f"{name}Pipeline", **changes}))
        return model

    return copied


def test_a_unet_for_inpainting_is_one_under_any_name(folder: Callable[..., Path]) -> None:
    model = folder("sdxl", "StableDiffusionXL")
    assert [task.name for task in tasks_of(model)] == ["text2image"]
    path = model / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "in_channels": 9}))
    assert [task.name for task in tasks_of(model)] == ["inpainting"]


def refiner(model: Path) -> None:
    """Without its first text encoder, and with a score where other models have a size."""
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(model / name)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = UNet2DConditionModel.load_config(str(model / "unet"))
        config |= {"cross_attention_dim": 32, "projection_class_embeddings_input_dim": 32 + 5 * 8}
        UNet2DConditionModel.from_config(config).save_pretrained(model / "unet")


def nine(model: Path) -> None:
    """With a UNet that sees the mask and the masked image."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = {**UNet2DConditionModel.load_config(str(model / "unet")), "in_channels": 9}
        UNet2DConditionModel.from_config(config).save_pretrained(model / "unet")


def test_inpainting_crops_to_the_mask_and_puts_the_image_back(folder: Callable[..., Path]) -> None:
    model = folder("sdxl", "StableDiffusionXLInpaint")
    larger = {"image": input_image().resize((100, 76)), "mask_image": mask().resize((100, 76))}
    inputs = {**SMALL, **PAINT, **larger, "padding_mask_crop": 8}
    ours = made(model, inputs, route="modular")
    assert ours.shape[1:3] == (76, 100)
    assert same(ours, media(run_reference("StableDiffusionXLModularPipeline", model, inputs)))


@pytest.mark.families
@pytest.mark.parametrize(
    ("family", "name", "inputs"),
    [
        ("flux-kontext", "FluxKontext", {"image": input_image(), "_auto_resize": False, "max_area": 64 * 64}),
        ("flux-kontext", "FluxKontext", {}),
        ("flux-kl", "FluxImg2Img", START),
        ("sd3", "StableDiffusion3Img2Img", START),
        ("qwenimage", "QwenImageImg2Img", {**START, "negative_prompt": "grey"}),
    ],
)
def test_a_class_with_blocks_makes_what_its_blocks_make(
    family: str, name: str, inputs: dict[str, Any], folder: Callable[..., Path]
) -> None:
    model = folder(family, name)
    given = {**SMALL, **inputs}
    found = modular_class({"_class_name": f"{name}Pipeline"})
    assert found is not None
    assert same(made(model, given, route="modular"), media(run_reference(found.__name__, model, given)))


@pytest.mark.families
def test_the_image_of_a_control_net_may_be_called_as_the_class_calls_it(folder: Callable[..., Path]) -> None:
    model = folder("sdxl", "StableDiffusionXLControlNet")
    theirs = media(run_reference("StableDiffusionXLModularPipeline", model, {**SMALL, "control_image": input_image(2)}))
    for name in ("control_image", "image"):
        assert same(made(model, {**SMALL, name: input_image(2)}, route="modular"), theirs)
    taken = load(model, Stage.ENCODER).signature.parameters
    assert ServingConfig().apply({"prompt": "x", "image": SimpleNamespace(files=("a",))}, taken).keys() >= {"image"}
    with pytest.raises(ParameterError, match="control_image is required"):
        ServingConfig().apply({"prompt": "x"}, taken)


@pytest.mark.families
@pytest.mark.parametrize(("name", "spoil", "inputs"), [("Img2Img", refiner, START), ("Inpaint", nine, PAINT)])
def test_a_refiner_and_a_unet_for_inpainting_are_served(
    name: str, spoil: Callable[[Path], None], inputs: dict[str, Any], folder: Callable[..., Path]
) -> None:
    gone = {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    model = folder("sdxl", f"StableDiffusionXL{name}", **(gone if spoil is refiner else {}))
    spoil(model)
    theirs = run_reference("StableDiffusionXLModularPipeline", model, {**SMALL, **inputs})
    assert same(made(model, {**SMALL, **inputs}, route="modular"), media(theirs))


@pytest.mark.parametrize(
    ("family", "name", "route", "inputs"),
    [
        ("flux-kl", "FluxInpaint", "", PAINT),
        pytest.param("sd3", "StableDiffusion3", "classic", {}, marks=pytest.mark.families),
        pytest.param("sdxl", "StableDiffusionXL", "classic", {}, marks=pytest.mark.families),
        pytest.param("qwenimage", "QwenImage", "classic", {}, marks=pytest.mark.families),
    ],
)
def test_the_classic_strategy_makes_what_the_class_makes(
    family: str, name: str, route: str, inputs: dict[str, Any], folder: Callable[..., Path]
) -> None:
    model = folder(family, name)
    assert strategy_for(model, ModelOptions(route=route)) is PartitionStrategy.CLASSIC
    plain = getattr(diffusers, f"{name}Pipeline").from_pretrained(str(model))
    plain.set_progress_bar_config(disable=True)
    given = {**SMALL, **inputs}
    assert same(made(model, given, route=route), media(plain(**given, generator=seeded_generator(SEED))))


def test_defaults_are_those_of_the_class_where_that_was_named(folder: Callable[..., Path]) -> None:
    model = folder("sdxl", "StableDiffusionXL")
    scales = [
        next(item.default for item in load(each, Stage.DECODER, route=route).signature.parameters if item.name == name)
        for each, route, name in ((model, "", "guidance_scale"), (model, "modular", "guidance_scale"))
    ]
    assert scales == [5.0, 7.5]
    assert load_modular_partition(folder("flux", "Flux")).defaults == {"num_inference_steps": 28}
    # Distilled, the blocks know better.
    assert load_modular_partition(folder("flux2-klein", "Flux2Klein"), ModelOptions(route="modular")).defaults == {}
    assert "strength" not in load_modular_partition(model, ModelOptions(task="inpainting")).defaults, (
        "not what the class does"
    )


@pytest.mark.families
@pytest.mark.parametrize(
    ("family", "name", "inputs"),
    [
        ("flux-kl", "FluxImg2Img", {"image": input_image()}),
        ("sd3", "StableDiffusion3", {}),
        ("sd3", "StableDiffusion3Img2Img", {"image": input_image()}),
        ("sdxl", "StableDiffusionXL", {}),
        ("sdxl", "StableDiffusionXLImg2Img", {"image": input_image()}),
    ],
)
def test_what_a_request_leaves_out_is_as_in_the_class(
    family: str, name: str, inputs: dict[str, Any], folder: Callable[..., Path]
) -> None:
    model = folder(family, name)
    assert strategy_for(model) is PartitionStrategy.MODULAR
    # A refiner takes its size from the image.
    given = {"prompt": "a red ship", "height": 64, "width": 64, "num_inference_steps": 5, **inputs}
    if name == "StableDiffusionXLImg2Img":
        del given["height"], given["width"]
    plain = getattr(diffusers, f"{name}Pipeline").from_pretrained(str(model))
    plain.set_progress_bar_config(disable=True)
    assert same(made(model, given), media(plain(**given, generator=seeded_generator(SEED))))


def test_a_guider_has_something_to_guide_away_from_as_the_class_has(folder: Callable[..., Path]) -> None:
    model = folder("sd3", "StableDiffusion3")
    theirs = [
        run_reference("StableDiffusion3ModularPipeline", model, {**SMALL, **more})
        for more in ({}, {"negative_prompt": ""})
    ]
    assert not same(*map(media, theirs))
    assert same(made(model, SMALL), media(theirs[1])), "the class encodes an empty text"
    assert same(made(model, SMALL, route="modular"), media(theirs[0]))
    unguided = {**SMALL, "guidance_scale": 1.0}
    plain = diffusers.StableDiffusion3Pipeline.from_pretrained(str(model))
    plain.set_progress_bar_config(disable=True)
    assert same(made(model, unguided), media(plain(**unguided, generator=seeded_generator(SEED))))


def test_what_is_served_is_said(folder: Callable[..., Path]) -> None:
    model = folder("flux-kontext", "FluxKontext")
    assert describe_serving(model, ModelOptions(), disaggregated=True) == (
        "FluxKontextPipeline, by the modular partition: image_conditioned (image, prompt) or text2image (prompt)",
        "",
    )
    pipeline = load(model, Stage.ENCODER)
    assert pipeline.signature.tasks == tasks_of(model)
    required = {item.name for item in pipeline.signature.parameters if item.required}
    assert required == {"prompt"}


def test_several_control_nets_are_for_the_class(folder: Callable[..., Path]) -> None:
    control = ["diffusers", "MultiControlNetModel"]
    assert strategy_for(folder("sdxl", "StableDiffusionXLControlNet")) is PartitionStrategy.MODULAR
    model = folder("sdxl-union", "StableDiffusionXLControlNetUnion")
    assert [task.name for task in tasks_of(model)] == ["controlnet_union_text2image"]
    index = {"_class_name": "StableDiffusionXLControlNetPipeline", "controlnet": control}
    (model / "model_index.json").write_text(
        json.dumps({**json.loads((model / "model_index.json").read_text()), **index})
    )
    assert strategy_for(model) is not PartitionStrategy.MODULAR
