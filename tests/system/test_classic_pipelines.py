"""Pipelines without blocks are served by the same processes, and one that cannot be cut says so at the start."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

from triptych.actors.command import app
from triptych.api.launch import Cluster
from triptych.engines.parameters.serving_config import load_serving_config

PROMPT = "a red ship"


@pytest.mark.shared_cluster("models")
def test_a_classic_pipeline_in_three_processes_makes_the_image_of_one(
    on_cluster: Callable[..., Any], models: Callable[[str], Path]
) -> None:
    async def scenario(cluster: Cluster) -> np.ndarray:
        image = await cluster.generate(PROMPT, model="pixart", seed=11)
        return np.asarray(image.image().convert("RGB"))

    ours = on_cluster(scenario)
    model = models("pixart")
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    made = pipeline(PROMPT, generator=torch.Generator("cpu").manual_seed(11), **load_serving_config(model).defaults)
    assert np.array_equal(ours, np.asarray(made.images[0]))


@pytest.mark.parametrize("disaggregated", [True, False])
def test_check_says_how_a_model_is_served(
    disaggregated: bool, models: Callable[[str], Path], tmp_path: Path, topology_of: Callable[..., Path]
) -> None:
    model = Path(shutil.copytree(models("pixart"), tmp_path / "model"))
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    topology = topology_of(model, None if disaggregated else {"monolithic": 1})
    # It cannot be run without its text encoder, which a dry request would find.
    shown = CliRunner().invoke(app, ["check", str(topology), "--model", "--no-dry-run"])
    if disaggregated:
        assert shown.exit_code == 2
        assert "PixArtSigmaPipeline, which cannot be cut into stages" in shown.stderr
        assert 'kind="monolithic"' in shown.stderr
    else:
        assert shown.exit_code == 0
        assert "PixArtSigmaPipeline, by the monolithic partition" in shown.stdout
