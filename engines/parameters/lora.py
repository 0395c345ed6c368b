"""LoRA adapters by name: what a topology configures and a request asks for. Imports no torch."""

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
        description="Name of the adapter to run with, or several; none where it is empty or left out.",
    ),
    Parameter(
        LORA_SCALE,
        ParameterKind.NUMBER,
        description="How strong the adapter is, or each of several; 1 is as it was trained.",
        many=True,
    ),
)
"""What a request may give where adapters are configured."""


def lora_parameters(known: Collection[str]) -> tuple[Parameter, ...]:
    """What a request may give where adapters of these names are configured, if any are."""
    lora, scale = PARAMETERS
    return (msgspec.structs.replace(lora, choices=tuple(sorted(known))), scale) if known else ()


class LoraFile(msgspec.Struct, frozen=True):
    """An adapter that a process loads when it starts."""

    name: str
    """By which requests ask for it."""
    path: Path
    """A `.safetensors` file, or a folder with exactly one."""
    scale: float = 1.0
    """Of requests that give none."""
    path_2: Path | None = None
    """The same for `transformer_2`, of models with two transformers whose adapters come as two files."""


class LoraChoice(msgspec.Struct, frozen=True):
    """An adapter that a request runs with."""

    name: str
    scale: float


def check_lora(inputs: Mapping[str, object], known: Collection[str], model: str = "") -> None:
    """Raise `ParameterError` where a request asks for an adapter that is not there, or for a scale that none has.

    Args:
        inputs: Of the request, by name; None stands for left out.
        known: Names of the adapters that are configured.
        model: Its name, for the sentence.
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
    """The adapters that checked inputs ask for, each with its scale, in the order that they are asked for."""
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
