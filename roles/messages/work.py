"""The nouns that several conversations share."""

from __future__ import annotations

from typing import TypeAlias, dataclass_transform

import msgspec

Scalar: TypeAlias = str | int | float | bool | None


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class Value(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """A part of a message; like a message, but never sent on its own."""


class Upload(Value):
    """A file of the upload store: what a client sent, checked."""

    name: str
    """SHA-256 of the bytes in hex, and the ending of its format."""
    nbytes: int
    pixels: int = 0
    """Of the image, 0 where nobody has counted."""


class Pictures(Value, tag=True):
    """An input that is one picture, or several in order."""

    files: tuple[Upload, ...]


class Numbers(Value, tag=True):
    """An input that is a list of numbers."""

    values: tuple[int | float, ...]


Input: TypeAlias = Scalar | Pictures | Numbers
"""An input of a request. Files ride as references."""


class Output(Value):
    """How the result of a unit is written down."""

    format: str = ""
    """An output format of the artifact store; "" for the one that suits what was made."""
    fps: float = 0.0
    """Frames per second of a video; 0 for the pipeline's own, and where none is made."""
    quality: int = 0
    """Of "jpeg" and "webp", 1 to 100; 0 for the store's own."""


class Renewal(Value):
    """What makes staged tensors of an equal prompt another request's."""

    inputs: dict[str, Input]
    """Of the other request, all of them."""
    seed: int
    """Of its unit."""


class Work(Value):
    """One attempt at one picture. Every message about a picture carries it."""

    unit_id: str
    """`REQUEST_ID/INDEX`: a request for n pictures is n units."""
    attempt: int
    """Counts dispatches from 1. What names an older attempt is fenced off."""

    def __str__(self) -> str:
        return f"{self.unit_id}#{self.attempt}"


class LeaseRef(Value):
    """A slot of a buffer pool, named so that a restarted pool can never be mistaken for its predecessor."""

    pool: str
    pool_generation: int
    lease_id: int
    offset: int
    """Bytes from the start of the pool's arena."""
    nbytes: int


class Staged(Value):
    """Tensors at rest in a sealed slot, and all that is needed to load them."""

    lease: LeaseRef
    manifest: bytes
    """msgpack, as `engines.codec.pack` made it: names, shapes, dtypes and plain values."""
    checksum: int
    """xxh3-64 of the slot's first `nbytes` bytes."""
    nbytes: int


class Artifact(Value):
    """A finished media file in the artifact store."""

    name: str
    content_type: str
    nbytes: int
