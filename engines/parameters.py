"""What a pipeline takes and makes, in words that any process can read. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum
from typing import Final, TypeAlias

import msgspec

Default: TypeAlias = bool | int | float | str | tuple[int | float, ...] | None


class Kind(StrEnum):
    """What a value of a parameter is."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    NUMBERS = "numbers"
    """A list of numbers."""
    PAIR = "pair"
    """Two whole numbers, of a size or a place; pipelines get a tuple."""
    IMAGE = "image"
    """One picture."""
    IMAGES = "images"
    """One picture, or several in order: a video is its frames."""
    IMAGE_LIST = "image_list"
    """The same, but pipelines get a list even of one."""


PICTURES: Final = frozenset({Kind.IMAGE, Kind.IMAGES, Kind.IMAGE_LIST})


class Parameter(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An input that a request may give."""

    name: str
    """The public one."""
    kind: Kind
    default: Default = None
    """What the pipeline uses where a request gives none; None where it works one out."""
    required: bool = False
    alias_of: str = ""
    """The parameter that this is another name of; "" where it is none."""
    description: str = ""
    """One sentence of the pipeline's own, where it has one."""
    multiple_of: int = 0
    """A whole number is a multiple of this; 0 where any will do."""
    every: int = 0
    """A whole number is 1, 1 + every, 1 + 2 * every and so on; 0 where any will do."""


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
