"""What a pipeline takes and makes, in words that any process can read. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Final, TypeAlias

import msgspec

Default: TypeAlias = bool | int | float | str | None


class Kind(StrEnum):
    """What a value of a parameter is."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    NUMBERS = "numbers"
    """A list of numbers."""
    IMAGE = "image"
    """One picture."""
    IMAGES = "images"
    """One picture, or several in order: a video is its frames."""


PICTURES: Final = frozenset({Kind.IMAGE, Kind.IMAGES})


class Parameter(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An input that a request may give."""

    name: str
    """The public one."""
    kind: Kind
    default: Default = None
    """What the pipeline uses where a request gives none; None where it works one out."""
    required: bool = False


class Signature(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a loaded pipeline takes and makes."""

    parameters: tuple[Parameter, ...] = ()
    """By name."""
    encodes: tuple[str, ...] = ()
    """Public names of the inputs that change what the encoder makes."""
    medium: str = "image"
    """What it makes: "image", "video" or "audio"."""
    fps: float = 0.0
    """Frames per second of its videos where a request asks for no other; 0 where it makes none."""

    def parameter(self, name: str) -> Parameter | None:
        """Find one by its public name."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)


def names(parameters: Collection[Parameter]) -> frozenset[str]:
    """Of parameters."""
    return frozenset(parameter.name for parameter in parameters)
