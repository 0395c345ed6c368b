"""A denoise goes on from a snapshot, in another pipeline, with the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from torch.utils import _pytree

from tests.engines.classic_models import request
from tests.engines.stage_pipelines import through_codec
from triptych.engines.model_options import ModelOptions
from triptych.engines.partition.loop_state import call_problem
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.engines.steps.checkpoint import CheckpointError
from triptych.engines.steps.denoising import Denoising
from triptych.tools.families.cases import Case, cases
from triptych.tools.families.classes import by_class
from triptych.tools.families.classes.tiny_components import make
from triptych.tools.families.stage_processes import CPU

Models = Callable[[str], Path]


def case(family: str, task: str, **more: object) -> Case:
    found = next(each for each in cases() if (each.family, each.task) == (family, task))
    return replace(found, inputs={**found.inputs, **more})


STEPS = {"num_inference_steps": 4}
HANDFUL = {
    "flow matching": case("flux", "text2image", **STEPS),
    "several steps back": case("wan", "", **STEPS),
    "noise in each step": case("sdxl", "text2image", scheduler="EulerAncestralDiscreteScheduler", **STEPS),
    "an image, in another memory format": case("sdxl", "image2image", num_inference_steps=6),
    "an object of the scheduler, and sound": case("ltx2", "text2video", **STEPS),
    "momentum": case("qwenimage", "text2image", guider="AdaptiveProjectedGuidance", **STEPS),
    "latents beside a condition": case("hunyuan_video1_5", "text2video", **STEPS),
}


def load(model: Path, task: str, *stages: Stage) -> StagePipeline:
    return StagePipeline.load(model, stages, dtype=torch.float32, device=CPU, options=ModelOptions(task=task))


def pauses(denoising: Denoising) -> Iterator[dict[str, object]]:
    """A snapshot at each pause of a run, as it arrives in another process."""
    while denoising.advance():
        yield through_codec(denoising.snapshot())


def finish(denoising: Denoising) -> dict[str, object]:
    while denoising.advance():
        pass
    return denoising.result()


def same(left: Mapping[str, object], right: Mapping[str, object]) -> bool:
    pairs = zip(_pytree.tree_leaves(dict(left)), _pytree.tree_leaves(dict(right)), strict=True)
    return left.keys() == right.keys() and all(
        torch.equal(one, other) for one, other in pairs if isinstance(one, torch.Tensor)
    )


def encoded(pipeline: StagePipeline, inputs: Mapping[str, object]) -> dict[str, object]:
    prompt = {"prompt": "a red circle"} if "prompt" in pipeline.accepted else {}
    return pipeline.encode({**prompt, **inputs}, 3)


def stochastic(model: Path, folder: Path) -> Path:
    """A copy of a Flux whose scheduler draws noise from torch's global generator in each step."""
    copied = Path(shutil.copytree(model, folder / "model"))
    settings = copied / "scheduler" / "scheduler_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "stochastic_sampling": True}))
    return copied


@pytest.mark.parametrize("one", HANDFUL.values(), ids=HANDFUL)
def test_a_modular_denoise_goes_on_from_every_step(one: Case, models: Models) -> None:
    model = models(one.family)
    here, elsewhere = load(model, one.task, Stage.ENCODER, Stage.DENOISER), load(model, one.task, Stage.DENOISER)
    payload = encoded(here, one.inputs)
    whole = here.denoise(payload)
    snapshots = list(pauses(whole))
    assert [snapshot["step"] for snapshot in snapshots] == list(range(1, len(snapshots) + 1))
    assert len(snapshots) >= 2
    for snapshot in snapshots:
        resumed = elsewhere.denoise(payload, resume=snapshot)
        resumed.advance()
        assert resumed.step == snapshot["step"] + 1  # type: ignore[operator]
        assert same(finish(resumed), whole.result())


CLASSIC = {
    "noise of the request": ("pixart", {"num_inference_steps": 4}),
    "two results of a step": ("cogvideox", {"num_inference_steps": 4}),
    "the first frame is kept": ("sana", {"num_inference_steps": 3}),
}


@pytest.mark.parametrize("name", CLASSIC)
def test_a_classic_denoise_goes_on_from_every_step(name: str, models: Models) -> None:
    family, more = CLASSIC[name]
    model = models(family)
    here, elsewhere = load(model, "", Stage.ENCODER, Stage.DENOISER), load(model, "", Stage.DENOISER)
    payload = here.encode(request(model, **more), 3)
    whole = here.denoise(payload)
    snapshots = list(pauses(whole))
    assert len(snapshots) == more["num_inference_steps"] - 1
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hook = elsewhere._runner.pipeline.transformer.register_forward_pre_hook(count)
    for snapshot in snapshots:
        resumed = elsewhere.denoise(payload, resume=snapshot)
        calls = 0
        resumed.advance()
        assert resumed.step == snapshot["step"] + 1  # type: ignore[operator]
        # Of the steps before the snapshot only the first is computed, for the shape of what the others return.
        assert calls == 2
        assert same(finish(resumed), whole.result())
        preview = elsewhere.preview(payload, snapshot)
        assert preview["latents"].shape == whole.result()["latents"].shape  # type: ignore[attr-defined]
    hook.remove()


def check_every_step(here: StagePipeline, elsewhere: StagePipeline, payload: dict[str, object]) -> int:
    """Go on from each pause of a run; returns their number."""
    whole = here.denoise(payload)
    snapshots = list(pauses(whole))
    for snapshot in snapshots:
        assert same(finish(elsewhere.denoise(payload, resume=snapshot)), whole.result()), snapshot["step"]
    return len(snapshots)


def test_a_classic_denoise_whose_scheduler_draws_from_the_global_generators_goes_on(models: Models) -> None:
    pipeline = load(models("pixart"), "", Stage.ENCODER, Stage.DENOISER)
    options = {"algorithm_type": "sde-dpmsolver++"}
    scheduler = {"scheduler": "DPMSolverMultistepScheduler", "scheduler_options": options}
    payload = pipeline.encode(request(models("pixart"), num_inference_steps=4, **scheduler), 3)
    assert check_every_step(pipeline, pipeline, payload) == 3


def test_a_whole_pipeline_goes_on(models: Models) -> None:
    pipeline = StagePipeline.load(
        models("pixart"), tuple(Stage), dtype=torch.float32, device=CPU, options=ModelOptions(route="classic")
    )
    payload = pipeline.encode(request(models("pixart"), num_inference_steps=3), 3)
    assert check_every_step(pipeline, pipeline, payload) == 2


def test_a_run_that_cannot_go_on_says_so(tmp_path: Path) -> None:
    sample = by_class()["AceStepPipeline"]
    make(sample, tmp_path)
    pipeline = StagePipeline.load(tmp_path, tuple(Stage), dtype=torch.float32, device=CPU)
    run = pipeline.denoise(pipeline.encode(sample.inputs, 3))
    assert run.advance()
    with pytest.raises(CheckpointError, match="momentum_buffer"):
        run.snapshot()
    assert "momentum_buffer" in run.cannot_resume
    assert finish(run)


@pytest.mark.families
@pytest.mark.parametrize("one", cases(), ids=lambda one: f"{one.family}:{one.task}")
def test_every_modular_task_goes_on_from_every_step(one: Case, models: Models) -> None:
    for package in one.needs:
        pytest.importorskip(package)
    pipeline = load(models(one.family), one.task, Stage.ENCODER, Stage.DENOISER)
    check_every_step(pipeline, pipeline, encoded(pipeline, one.inputs))


@pytest.mark.families
@pytest.mark.parametrize("name", [name for name, sample in by_class().items() if not sample.unbuilt])
def test_every_class_that_can_go_on_does(name: str, tmp_path: Path) -> None:
    sample = by_class()[name]
    for package in sample.needs:
        pytest.importorskip(package)
    if problem := call_problem(getattr(diffusers, name)):
        pytest.skip(problem)
    make(sample, tmp_path)
    options = ModelOptions(route="classic")
    try:
        pipeline = StagePipeline.load(tmp_path, tuple(Stage), dtype=torch.float32, device=CPU, options=options)
        payload = pipeline.encode(sample.inputs, 3)
        finish(pipeline.denoise(payload))
    except Exception as error:  # noqa: BLE001 - whether it is served at all is for other tests
        pytest.skip(str(error))
    check_every_step(pipeline, pipeline, payload)


def test_what_is_drawn_from_the_global_generators_goes_on(models: Models, tmp_path: Path) -> None:
    model = stochastic(models("flux"), tmp_path)
    pipeline = load(model, "text2image", Stage.ENCODER, Stage.DENOISER)
    payload = encoded(pipeline, HANDFUL["flow matching"].inputs)
    whole = pipeline.denoise(payload)
    resumed = [finish(pipeline.denoise(payload, resume=snapshot)) for snapshot in pauses(whole)]
    assert [same(result, whole.result()) for result in resumed] == [True] * 3


def test_a_run_that_went_on_can_be_saved_again(models: Models) -> None:
    one = HANDFUL["several steps back"]
    pipeline = load(models(one.family), one.task, Stage.ENCODER, Stage.DENOISER)
    payload = encoded(pipeline, one.inputs)
    expected = finish(pipeline.denoise(payload))
    snapshot: dict[str, object] | None = None
    for step in (1, 2, 3):
        run = pipeline.denoise(payload, resume=snapshot)
        assert run.advance()
        assert run.step == step
        snapshot = run.snapshot()
    assert same(finish(pipeline.denoise(payload, resume=snapshot)), expected)


def test_runs_that_take_turns_are_saved_apart(models: Models) -> None:
    one = HANDFUL["momentum"]
    pipeline = load(models(one.family), one.task, Stage.ENCODER, Stage.DENOISER)
    payloads = [encoded(pipeline, {**one.inputs, "prompt": prompt}) for prompt in ("a cat", "a ship")]
    expected = [finish(pipeline.denoise(payload)) for payload in payloads]
    runs = [pipeline.denoise(payload) for payload in payloads]
    for run in (*runs, *runs):
        run.advance()
    snapshots = [run.snapshot() for run in runs]
    for run in runs:
        run.cancel()
    again = [pipeline.denoise(payload, resume=saved) for payload, saved in zip(payloads, snapshots, strict=True)]
    while [run for run in again if run.advance()]:
        pass
    assert [same(run.result(), alone) for run, alone in zip(again, expected, strict=True)] == [True, True]


@pytest.mark.parametrize("name", ["flow matching", "several steps back"])
def test_a_preview_is_the_latents_so_far(name: str, models: Models) -> None:
    one = HANDFUL[name]
    pipeline = load(models(one.family), one.task, *Stage)
    payload = encoded(pipeline, one.inputs)
    whole = pipeline.denoise(payload)
    snapshots = list(pauses(whole))
    for snapshot in snapshots:
        preview = pipeline.preview(payload, snapshot)
        assert preview.keys() == whole.result().keys()
        seen, saved = preview["latents"], snapshot["run"]["block"]["latents"]  # type: ignore[index]
        # The blocks after the loop may unpack them: other shape, same numbers.
        assert torch.equal(seen.flatten().sort().values, saved.flatten().sort().values)  # type: ignore[attr-defined]
        assert pipeline.decode(preview).keys() == pipeline.decode(whole.result()).keys()
    assert not same(pipeline.preview(payload, snapshots[0]), pipeline.preview(payload, snapshots[1]))


def test_a_snapshot_that_does_not_fit_is_refused(models: Models) -> None:
    one = HANDFUL["flow matching"]
    pipeline = load(models(one.family), one.task, Stage.ENCODER, Stage.DENOISER)
    payload = encoded(pipeline, one.inputs)
    run = pipeline.denoise(payload)
    with pytest.raises(CheckpointError, match="between two of its steps"):
        run.snapshot()
    run.advance()
    run.advance()
    snapshot = run.snapshot()
    finish(run)
    with pytest.raises(CheckpointError, match="between two of its steps"):
        run.snapshot()
    with pytest.raises(CheckpointError, match="not a snapshot"):
        pipeline.denoise(payload, resume=payload)
    shorter = encoded(pipeline, {**one.inputs, "num_inference_steps": 2})
    for given, bucket, saved in (
        (shorter, 1, snapshot),
        (payload, 2, snapshot),
        (payload, 1, {**snapshot, "step": 5}),
        (payload, 1, {**snapshot, "kept": {**snapshot["kept"], "precision": ["Other"]}}),  # type: ignore[dict-item]
    ):
        other = pipeline.denoise(given, bucket, resume=saved)
        with pytest.raises(CheckpointError):
            other.advance()
        assert other.over
