"""The nouns that several conversations share."""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias, dataclass_transform

import msgspec
from msgspec import Meta

from triptych.bus import Generation

MAX_SEED: Final = (1 << 63) - 1

# What the decoder lets through: a value out of these ranges is refused with its message, and no handler meets it.
Name = Annotated[str, Meta(max_length=128)]
"""Of a component, a request, a job, a file, a state."""
Natural = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
"""Bytes, offsets, steps, credits and whatever else is counted."""
Word = Annotated[int, Meta(ge=0)]
"""64 bits."""
Seconds = Annotated[float, Meta(ge=0)]
"""A duration; never NaN, which would put a clock out of order."""
Seed = Annotated[int, Meta(ge=0, le=MAX_SEED)]

Scalar: TypeAlias = str | int | float | bool | None


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class Value(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """A part of a message; like a message, but never sent on its own."""


class Upload(Value):
    """A file of the upload store: what a client sent, checked."""

    name: Name
    """SHA-256 of the bytes in hex, and the ending of its format."""
    nbytes: Natural
    pixels: Natural = 0
    """Of the image, 0 where nobody has counted."""


class Images(Value, tag="Pictures"):
    """An input that is one image, or several in order."""

    files: tuple[Upload, ...]


class Numbers(Value, tag=True):
    """An input that is a list of numbers."""

    values: tuple[int | float, ...]


class Options(Value, tag=True):
    """An input that is an object of options by name."""

    values: dict[str, Scalar | tuple[int | float, ...]]


class Json(Value, tag=True):
    """An input that is texts in a list, lists in a list or an object."""

    json: Annotated[str, Meta(max_length=1 << 18)]
    """A document."""


class Tensors(Value, tag=True):
    """Several inputs, the tensors of a safetensors file."""

    file: Upload
    tensors: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=64)]
    """Their names."""


Input: TypeAlias = Scalar | Images | Numbers | Options | Json | Tensors
"""An input of a request. Files ride as references."""


class Output(Value):
    """How the result of a job is written down."""

    format: Name = ""
    """An output format of the artifact store; "" for the one that suits what was made."""
    fps: Annotated[float, Meta(ge=0)] = 0.0
    """Frames per second of a video; 0 for the pipeline's own, and where none is made."""
    quality: Annotated[int, Meta(ge=0, le=100)] = 0
    """Of "jpeg" and "webp", 1 to 100; 0 for the store's own."""


class Rebind(Value):
    """What makes stored tensors of an equal prompt another request's."""

    inputs: dict[str, Input]
    """Of the other request, all of them."""
    seed: Seed
    """Of its job."""


class Attempt(Value):
    """One attempt at a job. Every message about it carries it."""

    job_id: Name
    """`REQUEST_ID/INDEX`: a request for n images is n jobs."""
    number: Natural
    """Counts dispatches from 1. What names an older attempt is fenced off."""

    def __str__(self) -> str:
        return f"{self.job_id}#{self.number}"


class LeaseRef(Value):
    """A block of a buffer pool, named so that a restarted pool can never be mistaken for its predecessor."""

    pool: Name
    pool_generation: Generation
    lease_id: Word
    offset: Natural
    """Bytes from the start of the pool's arena."""
    nbytes: Natural


class StoredPayload(Value):
    """Tensors at rest in a sealed block, and all that is needed to load them."""

    lease: LeaseRef
    manifest: bytes
    """msgpack, as `engines.codec.pack` made it: names, shapes, dtypes and plain values."""
    checksum: Word
    """xxh3-64 of the block's first `nbytes` bytes."""
    nbytes: Natural


class Artifact(Value):
    """A finished media file in the artifact store."""

    name: Name
    content_type: Name
    nbytes: Natural
    nsfw_content_detected: bool | None = None
    """What the safety checker of the pipeline says, which has made the image black then; None without a checker."""
