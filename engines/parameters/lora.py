"""LoRA adapters as a topology configures them and a request names them. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import msgspec

from triptych.engines.parameters.schema import Parameter, ParameterKind
from triptych.engines.parameters.validation import ParameterError, default_limits, list_values, validate

LORA: Final = "lora"
LORA_SCALE: Final = "lora_scale"

PARAMETERS: Final = (
    Parameter(
        LORA,
        ParameterKind.TEXTS,
        description="Name of the LoRA adapter, or a list of names; by default none.",
    ),
    Parameter(
        LORA_SCALE,
        ParameterKind.NUMBER,
        description="Scale of the adapter, or a list of one scale for each; 1 is as it was trained.",
        many=True,
    ),
)
"""The parameters of models with adapters."""


def lora_parameters(known: Collection[str]) -> tuple[Parameter, ...]:
    """Return the parameters of a model with adapters of these names; () without adapters."""
    lora, scale = PARAMETERS
    return (msgspec.structs.replace(lora, choices=tuple(sorted(known))), scale) if known else ()


class LoraFile(msgspec.Struct, frozen=True):
    """An adapter that a process loads at its start."""

    name: str
    """The name in requests."""
    path: Path
    """A `.safetensors` file, or a folder with exactly one."""
    scale: float = 1.0
    """The default scale."""
    path_2: Path | None = None
    """The file for `transformer_2`, of adapters in two files for a model with two transformers."""


class LoraChoice(msgspec.Struct, frozen=True):
    """An adapter and its scale for a request."""

    name: str
    scale: float


def check_lora(inputs: Mapping[str, object], known: Collection[str], model: str = "") -> None:
    """Check the adapters and scales of a request.

    Args:
        inputs: The inputs of the request by name; None counts as missing.
        known: The names of the configured adapters.
        model: The name of the model, for the message.

    Raises:
        ParameterError: An adapter is unknown or named twice, or the scales are wrong.
    """
    for parameter in PARAMETERS:
        if inputs.get(parameter.name) is None:
            continue
        if not known:
            raise ParameterError(parameter.name, f"is not a parameter of {model or 'this model'}: it has no adapters.")
        limits = default_limits(parameter.name, parameter.kind)
        validate(parameter.name, inputs[parameter.name], parameter.kind, limits, many=parameter.many)
    names = _names(inputs)
    for name in names:
        if name not in known:
            raise ParameterError(LORA, f"must be one of {', '.join(sorted(known))}: there is no adapter {name[:64]!r}.")
    if len(set(names)) < len(names):
        raise ParameterError(LORA, "must not name an adapter twice.")
    scales = list_values(inputs.get(LORA_SCALE))
    if scales is not None and names and len(scales) != len(names):
        raise ParameterError(
            LORA_SCALE, f"must be one number, or {len(names)}, one for each adapter, not {len(scales)}."
        )


def choose_loras(inputs: Mapping[str, object], files: Collection[LoraFile]) -> tuple[LoraChoice, ...]:
    """Return the adapters and scales of checked inputs, in their order there."""
    known = {file.name: file for file in files}
    names = [name for name in _names(inputs) if name in known]
    scale = inputs.get(LORA_SCALE)
    scales = (list_values(scale) if names else None) or (scale,) * len(names)
    return tuple(
        LoraChoice(name, float(wanted) if isinstance(wanted, (int, float)) else known[name].scale)
        for name, wanted in zip(names, scales, strict=True)
    )


def _names(inputs: Mapping[str, object]) -> list[str]:
    return [str(name) for name in _each(inputs.get(LORA)) if name]


def _each(value: object) -> tuple[object, ...]:
    found = list_values(value)
    return (value,) if found is None else found
