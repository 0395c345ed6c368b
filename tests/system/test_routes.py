"""Pipelines without blocks are served by the same processes, and one that cannot be cut says so at the start."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from typer.testing import CliRunner

from triptych.actors import launch
from triptych.actors.command import app
from triptych.engines.card import load_card
from triptych.tools.make_classic import Classic, make_classic

FREE_PORTS = {"api": {"port": 0}}
PROMPT = "a red ship"


def test_a_classic_pipeline_in_three_processes_makes_the_picture_of_one(
    tmp_path: Path, topology_of: Callable[..., Path]
) -> None:
    model = tmp_path / "model"
    make_classic(model, Classic.PIXART)

    async def through_processes() -> np.ndarray:
        async with launch(topology_of(model), FREE_PORTS) as cluster:
            picture = await cluster.generate(PROMPT, seed=11)
            return np.asarray(picture.image().convert("RGB"))

    ours = asyncio.run(through_processes())
    pipeline = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    made = pipeline(PROMPT, generator=torch.Generator("cpu").manual_seed(11), **load_card(model).defaults)
    assert np.array_equal(ours, np.asarray(made.images[0]))


@pytest.mark.parametrize("in_parts", [True, False])
def test_check_says_how_a_model_is_served(in_parts: bool, tmp_path: Path, topology_of: Callable[..., Path]) -> None:
    model = tmp_path / "model"
    make_classic(model, Classic.PIXART)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "text_encoder": [None, None]}))
    topology = topology_of(model, None if in_parts else {"monolithic": 1})
    # It cannot be run without its text encoder, which a dry request would find.
    shown = CliRunner().invoke(app, ["check", str(topology), "--model", "--no-dry-run"])
    if in_parts:
        assert shown.exit_code == 2
        assert "PixArtSigmaPipeline, which cannot be run in parts" in shown.stderr
        assert 'kind="monolithic"' in shown.stderr
    else:
        assert shown.exit_code == 0
        assert "PixArtSigmaPipeline, by the monolithic route" in shown.stdout
