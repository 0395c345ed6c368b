"""Stages loaded one by one with some options, and what the plain pipeline makes with a LoRA of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModularPipeline

from tests.engines.results import media, seeded_generator
from triptych.engines.codec.codec import pack, unpack
from triptych.engines.parameters.serving_config import load_serving_config
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.tools.families.stage_processes import CPU
from triptych.tools.make_lora import make_lora

Models = Callable[[str], Path]
Pixels = np.ndarray[Any, Any]


class Stages:
    """Each stage of a model as a process of its own would have it: states between them go through the codec."""

    def __init__(self, model: Path, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.model = model
        self.pipelines = {
            stage: StagePipeline.load(model, (stage,), dtype=dtype, device=CPU, **options) for stage in Stage
        }

    def encode(self, seed: int, **inputs: Any) -> dict[str, object]:
        asked = {"prompt": "a red ship", **load_serving_config(self.model).defaults, **inputs}
        return through_codec(self.pipelines[Stage.ENCODER].encode(asked, seed))

    def denoise(self, state: dict[str, object]) -> dict[str, object]:
        denoising = self.pipelines[Stage.DENOISER].denoise(state)
        while denoising.advance():
            pass
        return through_codec(denoising.result())

    def decode(self, state: dict[str, object]) -> Pixels:
        return media(self.pipelines[Stage.DECODER].decode(state))

    def make(self, seed: int, **inputs: Any) -> Pixels:
        return self.decode(self.denoise(self.encode(seed, **inputs)))


def through_codec(state: dict[str, object]) -> dict[str, object]:
    packed = pack(state)
    slot = torch.zeros(max(packed.nbytes, 1), dtype=torch.uint8)
    packed.copy_to(slot)
    return unpack(packed.manifest, slot, CPU)


def plain(model: Path, dtype: torch.dtype = torch.float32, *, blocks: bool = False) -> Any:
    """The whole pipeline of a model, with or without blocks; in some cases the two differ in the last bits."""
    if blocks:
        whole = ModularPipeline.from_pretrained(str(model))
        whole.load_components(dtype=dtype)
        return whole
    pipeline = DiffusionPipeline.from_pretrained(str(model), dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def expected(pipeline: Any, model: Path, seed: int, **inputs: Any) -> Pixels:
    """What a plain pipeline makes, as it is."""
    asked = {"prompt": "a red ship", **load_serving_config(model).defaults, **inputs}
    if not isinstance(pipeline, ModularPipeline):
        asked["output_type"] = "np" if "num_frames" in asked else "pil"
    return media(pipeline(**asked, generator=seeded_generator(seed)))


def lora(folder: Path, model: Path, name: str, *components: str, **options: Any) -> Path:
    path = folder / f"{name}.safetensors"
    make_lora(model, path, seed=sum(name.encode()), components=components, **options)
    return path
