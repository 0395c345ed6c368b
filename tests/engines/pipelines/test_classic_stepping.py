"""ClassicFamily pipelines run one step at a time, in turns, and let go of what they hold."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.engines.classic_models import FAMILIES, Models, edit, finish, load, part, request
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.engines.steps.denoising import Denoising


def begin(pipeline: StagePipeline, model: Path, prompt: str, steps: int, seed: int, scale: float = 1.0) -> Denoising:
    inputs = request(model, prompt=prompt, num_inference_steps=steps, guidance_scale=scale)
    return pipeline.denoise(pipeline.encode(inputs, seed))


@pytest.mark.parametrize("family", ["pixart", "cogvideox"])
def test_each_advance_is_one_step(family: str, models: Models) -> None:
    model = models(family)
    pipeline = part(model)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    denoising = begin(pipeline, model, "a cat", 4, seed=1)
    assert (denoising.step, denoising.total_steps) == (0, None)
    hook = pipeline._runner.pipeline.transformer.register_forward_pre_hook(count)
    seen = []
    for _ in range(4):
        more = denoising.advance()
        seen.append((more, calls, denoising.step, denoising.total_steps))
    hook.remove()
    assert seen == [(True, 1, 1, 4), (True, 2, 2, 4), (True, 3, 3, 4), (False, 4, 4, 4)]
    assert denoising.advance() is False


@pytest.mark.parametrize("family", FAMILIES)
def test_requests_that_take_turns_are_identical_to_runs_alone(family: str, models: Models) -> None:
    model = models(family)
    pipeline = part(model)
    asked = [("a cat", 4, 1, 2.0), ("a ship at night", 6, 2, 1.0), ("a cat", 3, 1, 6.0)]
    alone = [finish(begin(pipeline, model, *one))["latents"] for one in asked]
    turns = [begin(pipeline, model, *one) for one in asked]
    running = list(turns)
    while running:
        running = [denoising for denoising in running if denoising.advance()]
    for denoising, latents in zip(turns, alone, strict=True):
        assert torch.equal(denoising.result()["latents"], latents)  # type: ignore[arg-type]
    assert not torch.equal(alone[0], alone[2])  # type: ignore[arg-type]


def test_a_payload_can_be_run_again(models: Models) -> None:
    model = models("cogvideox")
    pipeline = part(model)
    state = pipeline.encode(request(model, num_inference_steps=2), 4)
    first, second = (finish(pipeline.denoise(state))["latents"] for _ in range(2))
    assert torch.equal(first, second)  # type: ignore[arg-type]


def test_a_run_that_leaves_steps_out_counts_those_it_makes(models: Models, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models("chroma"), tmp_path / "model"))
    edit(model, _class_name="ChromaImg2ImgPipeline")
    pipeline = load(model, Stage.ENCODER, Stage.DENOISER)
    inputs = request(model, strength=0.5, image=Image.new("RGB", (64, 64), "red"))
    denoising = pipeline.denoise(pipeline.encode(inputs, 1))
    assert denoising.advance()
    assert (denoising.step, denoising.total_steps) == (1, 2)
    assert not denoising.advance()
    assert denoising.step == 2


def test_a_request_lets_go_of_its_tensors_by_itself(models: Models) -> None:
    model = models("sana")
    pipeline = part(model)
    held: list[weakref.ref[torch.Tensor]] = []
    hook = pipeline._runner.pipeline.transformer.register_forward_pre_hook(
        lambda _module, args, kwargs: held.extend(map(weakref.ref, (args[0], kwargs["encoder_hidden_states"]))),
        with_kwargs=True,
    )
    gc.disable()
    try:
        state = pipeline.encode(request(model, guidance_scale=1.0), 1)
        (call,) = state["calls"]  # type: ignore[misc]
        held.append(weakref.ref(call["result"][0]))
        denoising = pipeline.denoise(state)
        state = finish(denoising)
        held.append(weakref.ref(state["latents"]))  # type: ignore[arg-type]
        part(model, Stage.DECODER).decode(state)
        del call, denoising, state
        assert len(held) == 10
        assert [ref() for ref in held] == [None] * 10
    finally:
        gc.enable()
        hook.remove()


def test_cancel_in_mid_loop_frees_everything_and_disturbs_nobody(models: Models) -> None:
    model = models("pixart")
    pipeline = part(model)
    latents = finish(begin(pipeline, model, "a dog", 4, seed=2))["latents"]
    doomed = begin(pipeline, model, "a cat", 5, seed=1)
    other = begin(pipeline, model, "a dog", 4, seed=2)
    kept: list[weakref.ref[torch.Tensor]] = []
    hook = pipeline._runner.pipeline.transformer.register_forward_hook(
        lambda _module, args, _output: kept.append(weakref.ref(args[0]))
    )
    doomed.advance()
    hook.remove()
    other.advance()
    assert kept[0]() is not None
    doomed.cancel()
    assert doomed.cancelled
    assert kept[0]() is None
    assert doomed.advance() is False
    with pytest.raises(RuntimeError, match="1 of 5 steps"):
        doomed.result()
    assert torch.equal(finish(other)["latents"], latents)  # type: ignore[arg-type]
    early = begin(pipeline, model, "a cat", 2, seed=1)
    early.cancel()
    assert early.advance() is False
