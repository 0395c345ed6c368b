"""Runs of tiny models, of several families, that differ in prompt, seed, number of steps and guidance."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from triptych.engines.parameters.serving_config import load_serving_config
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.engines.steps.denoising import Denoising
from triptych.tools.families.stage_processes import CPU

Models = Callable[[str], Path]

INPUTS: dict[str, dict[str, Any]] = {
    "flux-kl": {"height": 32, "width": 32, "max_sequence_length": 16},
    "wan": {"height": 32, "width": 32, "num_frames": 3, "max_sequence_length": 16},
}


@cache
def pipeline_of(model: Path) -> StagePipeline:
    return StagePipeline.load(model, (Stage.ENCODER, Stage.DENOISER), dtype=torch.float32, device=CPU)


def payload(model: Path, number: int, **more: Any) -> dict[str, object]:
    """The payload of one of several requests that differ in all that may differ in a batch."""
    inputs = {**load_serving_config(model).defaults, **INPUTS.get(model.name, {}), "num_inference_steps": 3 + number}
    prompt = ("a red ship", "a small green house at night", "one white circle")[number % 3]
    guidance = {"guidance_scale": 2.0 + number}
    return pipeline_of(model).encode({"prompt": prompt, **inputs, **guidance, **more}, 7 + number)


def finish(denoising: Denoising) -> torch.Tensor:
    while denoising.advance():
        pass
    return latents_of(denoising)


def latents_of(denoising: Denoising) -> torch.Tensor:
    latents = denoising.result()["latents"]
    assert isinstance(latents, torch.Tensor)
    return latents
