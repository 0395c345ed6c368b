"""What diffusers alone makes of a request: the images that Triptych's must equal, bit for bit."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import httpx
import numpy as np
import torch
from diffusers import FluxPipeline, WanPipeline
from PIL import Image

from triptych.api.client import GeneratedImage

PIPELINES = {"flux": FluxPipeline, "wan": WanPipeline}


def diffusers_reference(family: str, model: Path, prompt: str, seed: int, **inputs: object) -> np.ndarray:
    """uint8 [height, width, 3] of the first image or frame, from the plain pipeline in one process."""
    pipeline = PIPELINES[family].from_pretrained(model, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    output = pipeline(prompt, generator=generator, output_type="pil", **inputs)
    frame = output.images[0] if family == "flux" else output.frames[0][0]
    return np.asarray(frame.convert("RGB"))


def pixels(image: GeneratedImage) -> np.ndarray:
    """uint8 [height, width, 3] of an image that a cluster has made."""
    return np.asarray(image.image().convert("RGB"))


def pixels_of_answer(answer: httpx.Response) -> np.ndarray:
    """The same of the first image in an answer of the API."""
    assert answer.status_code == 200, answer.text
    data = base64.b64decode(answer.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
