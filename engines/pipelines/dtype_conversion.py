"""Convert what crosses between stages that compute in different dtypes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final

import torch

DTYPE: Final = "serving_dtype"
"""The name in a state of the dtype that the stage which made it serves with."""


def convert_dtype(state: Mapping[str, object], dtype: torch.dtype) -> dict[str, object]:
    """Bring a state to the dtype of the stage that takes it.

    What has the dtype of the stage that made it was computed with its weights, and is converted; what has another one
    has that for a reason (masks, latents that a family keeps in float32), and stays.

    Args:
        state: With `DTYPE`; it is not changed.
        dtype: Of the stage that takes it.

    Returns:
        The same values without `DTYPE`.
    """
    values = {name: value for name, value in state.items() if name != DTYPE}
    made = state.get(DTYPE, dtype)
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
