"""LoRA adapters by name: what a topology configures and a request asks for. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import msgspec

from engines.checks import CardError, checked, limits_of
from engines.parameters import Kind, Parameter

LORA: Final = "lora"
LORA_SCALE: Final = "lora_scale"

PARAMETERS: Final = (
    Parameter(LORA, Kind.TEXT, description="Name of the adapter to run with; none where it is empty or left out."),
    Parameter(LORA_SCALE, Kind.NUMBER, description="How strong the adapter is; 1 is as it was trained."),
)
"""What a request may give where adapters are configured."""


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


class Choice(msgspec.Struct, frozen=True):
    """The one adapter that a request runs with."""

    name: str
    scale: float


def check_lora(inputs: Mapping[str, object], known: Collection[str], model: str = "") -> None:
    """Raise `CardError` where a request asks for an adapter that is not there, or for a scale that none has.

    Args:
        inputs: Of the request, by name; None stands for left out.
        known: Names of the adapters that are configured.
        model: Its name, for the sentence.
    """
    for parameter in PARAMETERS:
        if inputs.get(parameter.name) is None:
            continue
        if not known:
            raise CardError(parameter.name, f"is not a parameter of {model or 'this model'}: it has no adapters.")
        value = checked(
            parameter.name, inputs[parameter.name], parameter.kind, limits_of(parameter.name, parameter.kind)
        )
        if parameter.name == LORA and value and value not in known:
            raise CardError(
                LORA, f"must be one of {', '.join(sorted(known))}: there is no adapter {str(value)[:64]!r}."
            )


def choose(inputs: Mapping[str, object], files: Collection[LoraFile]) -> Choice | None:
    """The adapter that checked inputs ask for, with its scale; None for none."""
    name, scale = inputs.get(LORA), inputs.get(LORA_SCALE)
    found = next((file for file in files if file.name == name), None)
    if found is None:
        return None
    return Choice(found.name, float(scale) if isinstance(scale, (int, float)) else found.scale)
