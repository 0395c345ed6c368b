"""The shape of a packed payload: what `engines.codec` writes about the values that it lays into a block.

A manifest is a tree of small records. Scalars stand for themselves; everything with a body (tensors, arrays,
images, bytes, long strings, generator states) names a span of the block. Imports no torch, and decodes bytes
from anywhere: the worst that hostile bytes can do here is to raise `CodecError`.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

ALIGNMENT: Final = 64
"""Bytes; each span of a block starts on a multiple of this (a cache line, and what vector loads like)."""
MAX_MANIFEST_BYTES: Final = 512 * 1024
"""A manifest rides on the bus, whose messages are at most 1 MiB."""
MAX_DEPTH: Final = 32
VERSION: Final = 2

Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Bound = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)] | None
Dimension = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Shape = Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=32)]
Order = Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, lt=32)], ...], msgspec.Meta(max_length=32)]


class CodecError(Exception):
    """A value that cannot cross between stages, or a manifest that cannot be trusted."""


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The base of all records in a manifest."""


class Span(Record, frozen=True):
    """A stretch of the block."""

    offset: Size
    """Bytes from the start of the block, a multiple of `ALIGNMENT`."""
    nbytes: Size
    """Its length."""


class Tensor(Record, frozen=True, tag="tensor"):
    """A dense `torch.Tensor`."""

    dtype: Name
    """The name in `torch`, such as "bfloat16"."""
    shape: Shape
    """Its dimensions; () for a scalar tensor."""
    span: Span
    """Where its elements are."""
    order: Order = ()
    """Its dimensions as they lie in the span, the outermost first; () is row-major."""


class Array(Record, frozen=True, tag="array"):
    """A `numpy.ndarray`, row-major in its span."""

    dtype: Name
    """Its array-protocol string, such as "<f4"."""
    shape: Shape
    """Its dimensions."""
    scalar: bool
    """Whether it was a numpy scalar, not an array of no dimensions."""
    span: Span
    """Where its elements are."""


class ImageRecord(Record, frozen=True, tag="image"):
    """A `PIL.Image.Image`: its pixels only."""

    mode: Name
    """A Pillow mode, such as "RGB"."""
    width: Dimension
    """Pixels."""
    height: Dimension
    """Pixels."""
    span: Span
    """Where its rows are."""


class Bytes(Record, frozen=True, tag="bytes"):
    """A `bytes`."""

    span: Span
    """Where they are."""


class Text(Record, frozen=True, tag="text"):
    """A string too long to ride in the manifest."""

    span: Span
    """Where its UTF-8 is."""


class Generator(Record, frozen=True, tag="generator"):
    """A `torch.Generator` with its payload."""

    device: Name
    """The kind of its device: "cpu" or "cuda"."""
    span: Span
    """Where its payload (uint8) is."""


class BigInteger(Record, frozen=True, tag="integer"):
    """An int that needs more than 64 bits."""

    digits: Annotated[str, msgspec.Meta(max_length=4096)]
    """Its value in hexadecimal, with a sign."""


class DType(Record, frozen=True, tag="dtype"):
    """A `torch.dtype`."""

    name: Name
    """The name in `torch`."""


class Slice(Record, frozen=True, tag="slice"):
    """A `slice` of integers."""

    start: Bound
    """Where it starts, or None."""
    stop: Bound
    """Where it ends, or None."""
    step: Bound
    """How far apart its items are, or None."""


class List(Record, frozen=True, tag="list"):
    """A `list`."""

    items: tuple[Node, ...]
    """Its items."""


class Tuple(Record, frozen=True, tag="tuple"):
    """A `tuple`."""

    items: tuple[Node, ...]
    """Its items."""


class Dict(Record, frozen=True, tag="dict"):
    """A `dict` whose keys are scalars."""

    items: tuple[tuple[Key, Node], ...]
    """Its items, in order."""


class Dataclass(Record, frozen=True, tag="dataclass"):
    """An instance of a dataclass on the allow-list."""

    name: Name
    """The name it is registered by."""
    fields: tuple[tuple[Name, Node], ...]
    """Its fields, in order."""


Key = None | bool | int | float | str
Node = (
    None
    | bool
    | int
    | float
    | str
    | Tensor
    | Array
    | ImageRecord
    | Bytes
    | Text
    | Generator
    | BigInteger
    | DType
    | Slice
    | List
    | Tuple
    | Dict
    | Dataclass
)


class Manifest(Record, frozen=True):
    """All values of a payload, and how much of the block they take."""

    version: int
    """`VERSION` of the sender."""
    nbytes: Size
    """Bytes of the block in use."""
    values: Dict
    """The payload itself."""


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Manifest)


def encode(manifest: Manifest) -> bytes:
    """Write a manifest as msgpack.

    Raises:
        CodecError: It is longer than `MAX_MANIFEST_BYTES`, or holds text that is not Unicode.

    """
    try:
        data = _ENCODER.encode(manifest)
    except UnicodeEncodeError as error:
        raise CodecError(f"The payload holds text that is not valid Unicode: {error}.") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise CodecError(
            f"The manifest of the payload takes {len(data)} bytes, more than the {MAX_MANIFEST_BYTES} that a"
            " message can carry: put long lists of numbers into a tensor."
        )
    return data


def decode(data: bytes) -> Manifest:
    """Read a manifest from bytes that may be hostile.

    Raises:
        CodecError: The bytes are no manifest of this version.

    """
    if len(data) > MAX_MANIFEST_BYTES:
        raise CodecError(f"A manifest of {len(data)} bytes is over the limit of {MAX_MANIFEST_BYTES}.")
    try:
        manifest = _DECODER.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise CodecError(f"The manifest cannot be read: {error}") from error
    if manifest.version != VERSION:
        raise CodecError(f"The manifest has version {manifest.version}; this side reads version {VERSION}.")
    return manifest
