"""One request, and the pictures that requests give."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import numpy as np
from PIL import Image

from triptych.tools.make_model import Family

PROMPT: Final = "a large red circle on the left of a blue background"
SIDE: Final = 64


@dataclass(frozen=True)
class Case:
    """One request.

    Attributes:
        pipeline: The modular pipeline that it is for.
        task: A workflow of it; "" where it has just one.
        family: The tiny model.
        inputs: Of the request, besides the prompt.
        needs: Python packages that diffusers or transformers imports for it.
    """

    pipeline: str
    task: str
    family: Family
    inputs: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


@cache
def input_image(seed: int = 0) -> Image.Image:
    """A picture of coloured squares, [64, 64] pixels."""
    squares = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(squares).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


@cache
def mask() -> Image.Image:
    """White where a picture is to be painted anew: its right half."""
    half = np.zeros((SIDE, SIDE), dtype=np.uint8)
    half[:, SIDE // 2 :] = 255
    return Image.fromarray(half)


def video_frames(frames: int) -> list[Image.Image]:
    """A video: a list of pictures."""
    return [input_image(number) for number in range(frames)]


VISION: Final = ("torchvision",)
SMALL: Final = {"height": SIDE, "width": 48, "num_inference_steps": 3}
SQUARE: Final = {"height": SIDE, "width": SIDE, "num_inference_steps": 3}
VIDEO: Final = {**SQUARE, "num_frames": 5}
