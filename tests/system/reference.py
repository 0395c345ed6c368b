"""What diffusers alone makes of a request: the images that Triptych's must equal, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline, WanPipeline

PIPELINES = {"flux": FluxPipeline, "wan": WanPipeline}


def diffusers_reference(family: str, model: Path, prompt: str, seed: int, **inputs: object) -> np.ndarray:
    """uint8 [height, width, 3] of the first image or frame, from the plain pipeline in one process."""
    pipeline = PIPELINES[family].from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    output = pipeline(prompt, generator=generator, output_type="pil", **inputs)
    frame = output.images[0] if family == "flux" else output.frames[0][0]
    return np.asarray(frame.convert("RGB"))
