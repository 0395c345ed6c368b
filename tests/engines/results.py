"""What a run made, of whichever kind of pipeline, and whether two runs made the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def seeded_generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def media(result: Any) -> np.ndarray[Any, Any]:
    """The pixels of a result, [image or video, ...], of either kind of pipeline or of ours."""
    values = result if isinstance(result, dict) else vars(result)
    values = values.get("values", values)
    for name in ("images", "videos", "frames"):
        if values.get(name) is not None:
            return np.stack([np.asarray(item) for item in values[name]])
    raise AssertionError(f"no media in {sorted(values)}")


def same(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> bool:
    return left.shape == right.shape and left.dtype == right.dtype and left.tobytes() == right.tobytes()
