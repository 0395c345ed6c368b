"""Types that several messages share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Final, TypeAlias, dataclass_transform

import msgspec
from msgspec import Meta

from triptych.bus import Generation

MAX_SEED: Final = (1 << 63) - 1
MAX_PARTIAL_IMAGES: Final = 3
"""Most previews of one image, as in OpenAI's API."""

# The ranges that the decoder accepts: it refuses a message with another value, so that no handler receives it.
MAX_NAME: Final = 128
Name = Annotated[str, Meta(max_length=MAX_NAME)]
"""Of a component, a request, a job, a file, a state."""
Natural = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
"""Bytes, offsets, steps, credits and whatever else is counted."""
Word = Annotated[int, Meta(ge=0)]
"""64 bits."""
Seconds = Annotated[float, Meta(ge=0)]
"""A duration; never NaN, which would break the arithmetic of deadlines."""
MAX_PRIORITY: Final = 100
Priority = Annotated[int, Meta(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]
"""Of a request; 0 unless the client gives another. A higher one goes first."""
Bucket = Annotated[int, Meta(ge=1, le=1 << 16)]
"""Rows of a batch; 1 = alone."""
Seed = Annotated[int, Meta(ge=0, le=MAX_SEED)]

Scalar: TypeAlias = str | int | float | bool | None


@dataclass_transform(frozen_default=True, field_specifiers=(msgspec.field,))
class Value(msgspec.Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """A part of a message; encoded like a message, but never sent alone."""


class Upload(Value):
    """A checked file that a client sent, in the upload store."""

    name: Name
    """SHA-256 of the bytes in hex, and the ending of its format."""
    nbytes: Natural
    pixels: Natural = 0
    """Of the image, or of all frames of the video; 0 where unknown."""


class Images(Value, tag="Pictures"):
    """An input that is one image, or several in order; or one video, whose frames they are."""

    files: tuple[Upload, ...]


class Numbers(Value, tag=True):
    """An input that is a list of numbers."""

    values: tuple[int | float, ...]


class Options(Value, tag=True):
    """An input that is an object of options by name."""

    values: dict[str, Scalar | tuple[int | float, ...]]


class Json(Value, tag=True):
    """An input that is a list of texts, a list of lists or an object."""

    json: Annotated[str, Meta(max_length=1 << 18)]
    """A JSON document."""


class Tensors(Value, tag=True):
    """Several inputs, the tensors of a safetensors file."""

    file: Upload
    tensors: Annotated[tuple[Name, ...], Meta(min_length=1, max_length=64)]
    """Their names."""


Input: TypeAlias = Scalar | Images | Numbers | Options | Json | Tensors
"""An input of a request. Files are sent as references."""


def plain_value(value: Scalar | Numbers | Options | Json) -> object:
    """Return an input without files as JSON has it."""
    match value:
        case Numbers(values):
            return list(values)
        case Options(options):
            return options
        case Json(text):
            return json.loads(text)
        case _:
            return value


def uploads_of(inputs: Mapping[str, object]) -> set[Upload]:
    """Return the uploads that inputs refer to."""
    images = {upload for value in inputs.values() if isinstance(value, Images) for upload in value.files}
    return images | {value.file for value in inputs.values() if isinstance(value, Tensors)}


class Output(Value):
    """How the result of a job is written."""

    format: Name = ""
    """An output format of the artifact store; "" for the default of the medium."""
    fps: Annotated[float, Meta(ge=0)] = 0.0
    """Frames per second of a video; 0 for the pipeline's default, and for other media."""
    quality: Annotated[int, Meta(ge=0, le=100)] = 0
    """Of "jpeg" and "webp", 1 to 100; 0 for the default of the store."""
    metadata: bool | None = None
    """Whether the file says what it is made from; None for the default of the topology."""


class Provenance(Value):
    """What a file is made from, for its metadata."""

    model: str
    """Name of the model for clients."""
    inputs: dict[str, Input]
    """All inputs of the request, with the defaults of the model's serving config."""
    seed: Seed
    """Seed of the job."""


class Rebind(Value):
    """What adapts cached encoder outputs to another request of an equal prompt."""

    inputs: dict[str, Input]
    """All inputs of that request."""
    seed: Seed
    """Seed of its job."""


class SchedulingHints(Value):
    """What decides when the steps of a job are computed, and with how many others; none of it changes the job."""

    priority: Priority = 0
    """Of the request: higher ones go first."""
    due_s: Annotated[float, Meta(ge=-1e12)] | None = None
    """Seconds until the client wants the result, negative when they have passed; None without a deadline."""
    steps: Natural = 0
    """Denoising steps that are left, without those of a checkpoint; 0 where that is not known."""
    bucket: Bucket = 1
    """Rows of each batch that computes the job's steps; 1 = alone. Every attempt at a job has the same, since the last
    bits of the result depend on it."""
    owner: Name = ""
    """Name of the client's API key, among whom `fair` divides; "" without keys."""


class Attempt(Value):
    """One attempt at a job. Every message about the attempt has it."""

    job_id: Name
    """`REQUEST_ID/INDEX`: a request for n images is n jobs."""
    number: Natural
    """Counts dispatches from 1. Messages about an older attempt are ignored."""

    def __str__(self) -> str:
        return f"{self.job_id}#{self.number}"


class LeaseRef(Value):
    """A block of a buffer pool; the pool's generation tells a restarted pool from the one before."""

    pool: Name
    pool_generation: Generation
    lease_id: Word
    offset: Natural
    """Bytes from the start of the pool's arena."""
    nbytes: Natural


class StoredPayload(Value):
    """Tensors in a sealed block, and all that is needed to load them."""

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
    """Whether the pipeline's safety checker found NSFW content and made the image black; None without a checker."""
