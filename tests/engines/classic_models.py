"""Requests to tiny classic pipelines, and what the plain pipeline makes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from tests.engines.results import media, seeded_generator
from triptych.engines.parameters.serving_config import load_serving_config
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.engines.steps.denoising import Denoising
from triptych.tools.families.stage_processes import CPU

FAMILIES = ("pixart", "sana", "chroma", "cogvideox")
STAGE_COMPONENTS = [["text_encoder", "tokenizer"], ["scheduler", "transformer"], ["vae"]]
Models = Callable[[str], Path]


@cache
def plain(model: Path, dtype: torch.dtype) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(str(model), dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@cache
def part(model: Path, *stages: Stage) -> StagePipeline:
    return load(model, *(stages or (Stage.ENCODER, Stage.DENOISER)))


def request(model: Path, **more: Any) -> dict[str, Any]:
    return {"prompt": "a red ship", **load_serving_config(model).defaults, **more}


def expected(model: Path, inputs: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32) -> Any:
    output_type = "np" if "num_frames" in inputs else "pil"
    return media(plain(model, dtype)(**inputs, generator=seeded_generator(seed), output_type=output_type))


def finish(denoising: Denoising) -> dict[str, object]:
    while denoising.advance():
        pass
    return denoising.result()


def edit(model: Path, **changes: object) -> None:
    path = model / "model_index.json"
    index = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in index.items() if value is not None}))


def load(model: Path, *stages: Stage) -> StagePipeline:
    return StagePipeline.load(model, stages, dtype=torch.float32, device=CPU)
