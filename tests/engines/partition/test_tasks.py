"""The task that a topology chooses goes before that of the model's serving config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.engines.model_options import ModelOptions
from triptych.engines.parameters.schema import Task
from triptych.engines.parameters.serving_config import load_serving_config
from triptych.engines.partition.strategy import PartitionStrategy, describe_serving, strategy_for
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import ModelError, Stage
from triptych.tools.families.cases import input_image

CPU = torch.device("cpu")
SMALL = {"prompt": "a ship", "height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": 32}


def load(model: Path, task: str) -> StagePipeline:
    return StagePipeline.load(model, tuple(Stage), dtype=torch.float32, device=CPU, options=ModelOptions(task=task))


def make(pipeline: StagePipeline, **inputs: Any) -> Image.Image:
    denoising = pipeline.denoise(pipeline.encode({**SMALL, **inputs}, 5))
    while denoising.advance():
        pass
    (image,) = pipeline.decode(denoising.result())["images"]
    return image


def test_any_task_makes_what_each_task_alone_makes(models: Callable[[str], Path]) -> None:
    model = models("flux-kl")
    everything = load(model, "any")
    start = {"image": input_image(), "strength": 0.7}
    for task, inputs in (("text2image", {}), ("image-to-image", start)):
        assert np.array_equal(make(everything, **inputs), make(load(model, task), **inputs))


def test_the_task_says_what_is_required(models: Callable[[str], Path]) -> None:
    required = [
        {item.name for item in load(models("flux-kl"), task).signature.parameters if item.required}
        for task in ("", "image2image", "any")
    ]
    assert required == [{"prompt"}, {"prompt", "image"}, {"prompt"}]
    tasks = {task: load(models("flux-kl"), task).signature.tasks for task in ("", "any")}
    assert tasks[""] == (Task("text2image", ("prompt",), ("prompt",)),)
    assert [task.name for task in tasks["any"]] == ["text2image", "image2image"]
    assert load_serving_config(models("flux-kl"), "any").task == "any"
    assert load_serving_config(models("flux-kl")).task == "text-to-image"


def test_a_task_that_a_pipeline_has_not_is_an_error_that_lists_those_that_it_has(
    models: Callable[[str], Path],
) -> None:
    with pytest.raises(ModelError, match="text2image, image2image"):
        load(models("flux-kl"), "text2video")
    assert (
        "text2image, image2image"
        in describe_serving(models("flux-kl"), ModelOptions(task="text2video"), disaggregated=True)[1]
    )
    assert strategy_for(models("pixart"), ModelOptions(task="text-to-image")) is PartitionStrategy.CLASSIC
    with pytest.raises(ModelError, match='PixArtSigmaPipeline does text2image, not "image2image"'):
        load(models("pixart"), "image2image")
