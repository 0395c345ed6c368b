"""Models in the forms that people have them in: each served in three panels, identical to diffusers' own loading."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from engines.options import DEFAULTS, ModelOptions
from engines.panels import Panel
from engines.pipeline import PanelPipeline
from tests.engines.conftest import Models
from tests.engines.results import media, same, seeded

CPU = torch.device("cpu")
FLUX: dict[str, Any] = {
    "prompt": "a red boat",
    "height": 32,
    "width": 32,
    "num_inference_steps": 2,
    "max_sequence_length": 16,
}


def load(
    model: Path, panel: Panel, options: ModelOptions = DEFAULTS, dtype: torch.dtype = torch.float32
) -> PanelPipeline:
    return PanelPipeline.load(model, (panel,), dtype=dtype, device=CPU, options=options)


def served(
    model: Path, inputs: dict[str, Any], options: ModelOptions = DEFAULTS, dtype: torch.dtype = torch.float32
) -> np.ndarray[Any, Any]:
    """What three panels make, each of which has loaded its own components alone."""
    encoder, denoiser, decoder = (load(model, panel, options, dtype) for panel in Panel)
    assert not encoder.components & denoiser.components & decoder.components
    denoising = denoiser.denoise(encoder.encode(inputs, 7))
    while denoising.advance():
        pass
    return media(decoder.decode(denoising.result()))


def plain(pipeline: Any, inputs: dict[str, Any]) -> np.ndarray[Any, Any]:
    pipeline.set_progress_bar_config(disable=True)
    return media(pipeline(generator=seeded(7), **inputs))


def copied(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder / "model"))


# Variants and shards ----------------------------------------------------------------------------------------------


def saved(model: Path, folder: Path, **how: Any) -> Path:
    """A model as diffusers saves it, with its card."""
    DiffusionPipeline.from_pretrained(str(model)).save_pretrained(str(folder), **how)
    shutil.copy(model / "triptych.json", folder)
    return folder


def test_a_folder_with_nothing_but_a_variant_is_served(models: Models, tmp_path: Path) -> None:
    model = saved(models("flux"), tmp_path / "model", variant="fp16")
    assert not list(model.glob("*/model.safetensors"))
    theirs = DiffusionPipeline.from_pretrained(str(model), variant="fp16")
    assert same(served(model, FLUX), plain(theirs, FLUX))
    assert load(model, Panel.DENOISER).placement.notes == {"transformer": 'variant "fp16"'}


def test_a_variant_is_read_where_the_topology_says_so(models: Models, tmp_path: Path) -> None:
    model = copied(models("flux"), tmp_path)
    other = DiffusionPipeline.from_pretrained(str(model)).transformer
    with torch.no_grad():
        other.proj_out.weight.mul_(-1)
    other.save_pretrained(str(model / "transformer"), variant="ema")
    theirs = DiffusionPipeline.from_pretrained(str(model), transformer=other)
    ours = served(model, FLUX, ModelOptions(variant="ema"))
    assert same(ours, plain(theirs, FLUX))
    assert not same(ours, served(model, FLUX))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_are_served_of_every_component(variant: str | None, models: Models, tmp_path: Path) -> None:
    model = saved(models("flux"), tmp_path / "model", max_shard_size="40KB", variant=variant)
    assert list(model.glob("transformer/*-of-*"))
    assert list(model.glob("text_encoder/*-of-*"))
    theirs = DiffusionPipeline.from_pretrained(str(model), variant=variant)
    assert same(served(model, FLUX), plain(theirs, FLUX))
