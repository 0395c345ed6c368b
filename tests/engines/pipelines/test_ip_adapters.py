"""An IP adapter beside a model is loaded for the tasks that are about one, and for no other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engines.results import media, same
from triptych.engines.pipelines.modular import IP_ADAPTER_FOLDER
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import ModelError, Stage
from triptych.tools.families.cases import input_image
from triptych.tools.families.compare import run_reference

Models = Callable[[str], Path]
INPUTS: dict[str, Any] = {"prompt": "a red ship", "height": 32, "width": 32, "num_inference_steps": 1}


def load(model: Path, *stages: Stage) -> StagePipeline:
    return StagePipeline.load(model, stages, dtype=torch.float32, device=torch.device("cpu"))


def shown(model: Path, seed: int) -> np.ndarray[Any, Any]:
    """What is made of a request that shows the image of a seed."""
    encoder, denoiser, decoder = (load(model, stage) for stage in Stage)
    denoising = denoiser.denoise(encoder.encode({**INPUTS, "ip_adapter_image": input_image(seed)}, 11))
    while denoising.advance():
        pass
    return media(decoder.decode(denoising.result()))


@pytest.fixture
def adapted(models: Models, tmp_path: Path) -> Path:
    """A tiny SDXL whose task is about an adapter; the test may spoil it."""
    model = Path(shutil.copytree(models("sdxl"), tmp_path / "model"))
    serving_config = model / "triptych.json"
    serving_config.write_text(json.dumps({**json.loads(serving_config.read_text()), "task": "ip_adapter_text2image"}))
    return model


def test_the_image_is_that_of_the_plain_pipeline_and_depends_on_what_it_is_shown(adapted: Path) -> None:
    made = shown(adapted, 3)
    expected = run_reference(
        "StableDiffusionXLModularPipeline", adapted, {**INPUTS, "ip_adapter_image": input_image(3)}
    )
    assert same(made, media(expected))
    assert not same(made, shown(adapted, 4))


def test_all_adapters_of_the_folder_are_loaded_in_the_order_of_their_names(adapted: Path) -> None:
    first = adapted / IP_ADAPTER_FOLDER / "tiny.safetensors"
    other = {name: 2 * tensor for name, tensor in load_file(first).items()}
    save_file(other, first.with_name("another.safetensors"))
    pipeline = load(adapted, Stage.DENOISER)._runner.pipeline
    layers = pipeline.unet.encoder_hid_proj.image_projection_layers
    assert [layer.norm.weight[0].item() for layer in layers] == [2.0, 1.0]


def test_other_tasks_and_stages_are_left_as_they_are(models: Models, adapted: Path) -> None:
    assert load(models("sdxl"), Stage.DENOISER)._runner.pipeline.unet.encoder_hid_proj is None
    assert load(adapted, Stage.DECODER).components == {"vae"}


def test_a_task_without_its_adapter_is_a_model_error(adapted: Path) -> None:
    shutil.rmtree(adapted / IP_ADAPTER_FOLDER)
    for stage in Stage:
        with pytest.raises(ModelError, match=r"has no IP adapter: its task needs ip_adapter/\*\.safetensors in it\."):
            load(adapted, stage)


def test_an_adapter_that_does_not_fit_is_a_model_error(adapted: Path) -> None:
    path = adapted / IP_ADAPTER_FOLDER / "tiny.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "image_proj.norm" not in name}, path)
    with pytest.raises(ModelError, match=r"The IP adapter in .*ip_adapter cannot be loaded"):
        load(adapted, Stage.DENOISER)
    path.write_bytes(b"no tensors")
    with pytest.raises(ModelError, match=r"The IP adapter in .*ip_adapter cannot be loaded"):
        load(adapted, Stage.ENCODER)
