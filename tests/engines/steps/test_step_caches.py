"""With a step cache, runs that alternate are those alone, and a run leaves nothing behind."""

from __future__ import annotations

import gc
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.stage_pipelines import through_codec
from tests.engines.steps.runs import INPUTS, Models, finish, latents_of, pipeline_of
from triptych.engines.model_options import ModelOptions
from triptych.engines.parameters.serving_config import load_serving_config
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import InputError, ModelError, Stage
from triptych.engines.steps.checkpoint import CheckpointError
from triptych.engines.steps.denoising import Denoising
from triptych.engines.steps.executor import StepExecutor
from triptych.engines.steps.step_caches import branch_of, possible_caches
from triptych.tools.families.stage_processes import CPU

RATIOS = "ratios=1.0 1.02 1.01 0.99 1.0 0.99"
EACH = ("first_block:0.3", f"magcache:0.3,{RATIOS}", "taylorseer:3", "pab:cross_interval=2", "faster")
CELLS = [
    *(("flux-kl", text) for text in EACH),
    ("wan", "first_block:0.3"),
    ("wan", "taylorseer:3"),
    ("pixart", "taylorseer:3"),
]


@cache
def with_cache(model: Path, text: str) -> StagePipeline:
    options = ModelOptions(step_cache=text)
    return StagePipeline.load(model, (Stage.ENCODER, Stage.DENOISER), dtype=torch.float32, device=CPU, options=options)


def payload(model: Path, text: str, number: int, **more: Any) -> dict[str, object]:
    inputs = {
        **load_serving_config(model).defaults,
        **INPUTS.get(model.name, {}),
        "num_inference_steps": 8 - 2 * number,
    }
    prompt = ("a red ship", "a small green house at night")[number]
    return with_cache(model, text).encode({"prompt": prompt, **inputs, "guidance_scale": 2.0 + number, **more}, number)


def alternating(runs: list[Denoising]) -> list[torch.Tensor]:
    live = list(runs)
    while live:
        live = [run for run in live if run.advance()]
    return [latents_of(run) for run in runs]


@pytest.mark.parametrize(("family", "text"), CELLS)
def test_runs_that_alternate_are_those_alone(family: str, text: str, models: Models) -> None:
    model = models(family)
    pipeline = with_cache(model, text)
    payloads = [payload(model, text, number) for number in (0, 1)]
    alone = [finish(pipeline.denoise(each)) for each in payloads]
    together = alternating([pipeline.denoise(each) for each in payloads])
    assert all(map(torch.equal, alone, together))
    assert pipeline.step_cache is not None
    assert 0 < pipeline.step_cache.computed < pipeline.step_cache.calls
    # Off, it is as if there were none, also beside a run with it.
    plain = [finish(pipeline_of(model).denoise(each)) for each in payloads]
    assert not any(map(torch.equal, alone, plain))
    off = payload(model, text, 1, cache=False)
    mixed = alternating([pipeline.denoise(payloads[0]), pipeline.denoise(off)])
    assert torch.equal(mixed[0], alone[0])
    assert torch.equal(mixed[1], plain[1])


@pytest.mark.parametrize("text", EACH)
def test_a_run_that_ends_leaves_nothing_behind(text: str, models: Models) -> None:
    model = models("flux-kl")
    pipeline = with_cache(model, text)
    run = pipeline.denoise(payload(model, text, 0))
    run.advance()
    assert run.step_cache is not None
    assert run.step_cache.nbytes > 0
    kept = weakref.ref(run.step_cache)
    tensors = [weakref.ref(tensor) for tensor in _tensors(run.step_cache._states["transformer"].attributes())]
    assert tensors
    run.cancel()
    del run
    gc.collect()
    assert kept() is None
    assert not any(tensor() is not None for tensor in tensors)


@pytest.mark.parametrize(
    ("family", "text"), [("flux-kl", EACH[0]), ("wan", EACH[2]), ("flux-kl", EACH[1]), ("pixart", EACH[2])]
)
def test_a_snapshot_has_what_the_cache_keeps(family: str, text: str, models: Models) -> None:
    model = models(family)
    pipeline = with_cache(model, text)
    given = payload(model, text, 1)
    expected = finish(pipeline.denoise(given))
    run = pipeline.denoise(given)
    snapshots = []
    while run.advance():
        snapshots.append(through_codec(run.snapshot()))
    for snapshot in snapshots:
        assert torch.equal(finish(pipeline.denoise(given, resume=snapshot)), expected)
    run = pipeline_of(model).denoise(given, resume=snapshots[0])
    with pytest.raises(CheckpointError, match="other caches"):
        run.advance()


def test_in_a_bucket_runs_with_a_cache_are_computed_alone(models: Models) -> None:
    model, text = models("flux-kl"), EACH[0]
    pipeline = with_cache(model, text)
    given = payload(model, text, 0)
    runs = [pipeline.denoise(given, bucket=2) for _ in range(2)]
    executor = StepExecutor()
    live = runs
    while live:
        results = executor.advance(live)
        live = [run for run, result in zip(live, results, strict=True) if result.more]
    assert set(executor.group_sizes) == {1}
    expected = finish(pipeline.denoise(given))
    assert all(torch.equal(latents_of(run), expected) for run in runs)


def test_a_cache_that_a_model_does_not_take_is_refused_with_those_that_it_may_take(models: Models) -> None:
    with pytest.raises(ModelError) as raised:
        with_cache(models("sdxl"), "first_block:0.1")
    assert str(raised.value) == (
        'cache = "first_block:0.1" does not work with the unet, a UNet2DConditionModel: it has no list of transformer'
        " blocks. It may take taylorseer, pab."
    )
    with pytest.raises(ModelError, match="its ratios have to be measured"):
        with_cache(models("wan"), "magcache")
    transformer = pipeline_of(models("wan"))._runner.pipeline.transformer
    assert possible_caches(transformer) == ("first_block", "magcache", "taylorseer", "pab", "faster")
    assert not hasattr(transformer.blocks[0], "_diffusers_hook")


def test_branches_are_told_apart(models: Models) -> None:
    model = models("wan")
    run = with_cache(model, EACH[0]).denoise(payload(model, EACH[0], 0))
    names = []
    for _ in range(2):
        while (call := run.proceed()) is not None:
            names.append(branch_of(call))
            call.compute()
    run.cancel()
    assert names == ["pred_cond", "pred_uncond"] * 2


def test_only_a_model_with_a_cache_takes_the_parameter(models: Models) -> None:
    model = models("flux-kl")
    pipeline = with_cache(model, EACH[0])
    parameter = pipeline.signature.parameter("cache")
    assert parameter is not None
    assert (parameter.default, EACH[0] in parameter.description) == (True, True)
    assert "cache" not in pipeline.signature.encodes
    assert pipeline_of(model).signature.parameter("cache") is None
    with pytest.raises(InputError, match="cache must be true or false"):
        payload(model, EACH[0], 0, cache="no")
    given = payload(model, EACH[0], 0, cache=False)
    assert given["cache"] is False
    again = pipeline.rebind(given, {"prompt": "a red ship"}, 3)
    assert "cache" not in again


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in _tensors(item)]
