"""What a model is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

Component = Callable[[], Any]


class Size(StrEnum):
    """How large the weights are."""

    TINY = "tiny"
    """Some 100 KB, for tests."""
    MID = "mid"
    """Some 2 GB, where memory is measured: the weights outweigh the interpreter."""
    FULL = "full"
    """As large as the original's."""


@dataclass(frozen=True)
class Recipe:
    """A model that can be made.

    Attributes:
        pipeline: The class that its index names.
        task: A workflow of the pipeline, such as "text-to-image"; "" where it has just one.
        components: How each component is made, by its name in the index; None is one that the model goes without.
        defaults: The parameters of its serving config.
        ranges: Their limits.
        settings: What else the index says.
        files: How the tensors of each file beside the components are made, by its path in the folder.
        dtype: Of the weights.
        size: Likewise.
        randomise_zero_layers: Whether layers that begin as zeros get random weights.
    """

    pipeline: str
    task: str
    components: dict[str, Component | None]
    defaults: dict[str, float]
    ranges: dict[str, list[int]] = field(default_factory=dict)
    settings: dict[str, object] = field(default_factory=dict)
    files: dict[str, Callable[[], dict[str, torch.Tensor]]] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    size: Size = Size.TINY
    randomise_zero_layers: bool = False


def image_defaults(side: int = 64, steps: int = 4, text: int = 64, **more: float) -> dict[str, float]:
    """Defaults of a model of images: a square of `side` pixels, `text` tokens."""
    return {"height": side, "width": side, "num_inference_steps": steps, "max_sequence_length": text, **more}


def size_ranges(multiple: int, *, most: int = 256, text: int = 256) -> dict[str, list[int]]:
    """Ranges of a model whose sides are multiples of a number of pixels."""
    low = max(16, multiple)
    return {"height": [low, most, multiple], "width": [low, most, multiple], "max_sequence_length": [2, text]}
