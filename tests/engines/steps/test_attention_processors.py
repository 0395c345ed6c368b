"""Runs of pipelines that replace attention processors of shared modules do not disturb each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.engines.steps.runs import finish, latents_of, pipeline_of
from triptych.engines.steps.executor import StepExecutor
from triptych.tools.families.classes import by_class, tiny_components


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pag")
    tiny_components.make(by_class()["StableDiffusionPAGPipeline"], folder)
    return folder


def test_perturbed_attention_of_one_run_does_not_reach_the_others(model: Path) -> None:
    pipeline = pipeline_of(model)
    common = {"prompt": "a cat", "height": 32, "width": 32}
    # The second is not perturbed, and the first ends before the others.
    asked = [{"pag_scale": 3.0, "num_inference_steps": 2}, {"pag_scale": 0.0}, {"pag_scale": 2.0}]
    payloads = [pipeline.encode({"num_inference_steps": 3, **common, **each}, 1) for each in asked]
    # Those that it was loaded with.
    layers = pipeline._runner.pipeline.unet.attn_processors
    expected = [finish(pipeline.denoise(payload)) for payload in payloads]
    for bucket in (1, 2):
        runs = [pipeline.denoise(payload, bucket) for payload in payloads]
        executor, live = StepExecutor(), runs
        while live:
            live = [run for run, result in zip(live, executor.advance(live), strict=True) if result.more]
            assert pipeline._runner.pipeline.unet.attn_processors == layers
        for run, latents in zip(runs, expected, strict=True):
            assert float((latents_of(run) - latents).abs().max()) <= (0 if bucket == 1 else 1e-5)
    assert not torch.equal(expected[0], expected[2])


def test_an_error_leaves_the_processors_as_they_were(model: Path) -> None:
    pipeline = pipeline_of(model)
    unet = pipeline._runner.pipeline.unet
    before = unet.attn_processors
    inputs = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 2}
    run = pipeline.denoise(pipeline.encode(inputs, 1))

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    hook = unet.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        run.advance()
    hook.remove()
    assert unet.attn_processors == before
