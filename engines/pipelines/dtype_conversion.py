"""Convert payloads between stages that compute in different dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import torch

DTYPE: Final = "serving_dtype"
"""The key in a payload of the dtype of the stage that made it."""


def convert_dtype(payload: Mapping[str, object], dtype: torch.dtype) -> dict[str, object]:
    """Convert a payload to the dtype of the stage that receives it.

    Tensors of the sender's dtype are converted. Others have theirs for a reason (masks, latents in float32) and are
    kept.

    Args:
        payload: The payload, with `DTYPE`; it is not changed.
        dtype: The dtype of the receiving stage.

    Returns:
        The converted values, without `DTYPE`.
    """
    values = {name: value for name, value in payload.items() if name != DTYPE}
    made = payload.get(DTYPE, dtype)
    return values if made == dtype else {name: _convert(value, made, dtype) for name, value in values.items()}


def _convert(value: Any, old: object, new: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(new) if value.dtype == old else value
    if isinstance(value, torch.dtype):
        return new if value == old else value
    if isinstance(value, Mapping):
        return {name: _convert(item, old, new) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_convert(item, old, new) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_convert(item, old, new) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: _convert(item, old, new) for name, item in fields.items()})
    return value
