"""The manifest of a packed payload: a tree of records that describe the values in a block.

Scalars are in the manifest itself. Tensors, arrays, images, bytes, long strings and generator states are in the block;
their records name the span. Imports no torch. `decode` accepts bytes from anywhere and raises nothing but `CodecError`.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec

ALIGNMENT: Final = 64
"""Each span of a block starts at a multiple of this many bytes: a cache line, the alignment of vector loads."""
MAX_MANIFEST_BYTES: Final = 512 * 1024
"""The limit of a manifest: it is sent over the bus, whose messages are at most 1 MiB."""
MAX_DEPTH: Final = 32
VERSION: Final = 2

Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Bound = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)] | None
Dimension = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
Name = Annotated[str, msgspec.Meta(max_length=256)]
Shape = Annotated[tuple[Dimension, ...], msgspec.Meta(max_length=32)]
Order = Annotated[tuple[Annotated[int, msgspec.Meta(ge=0, lt=32)], ...], msgspec.Meta(max_length=32)]


class CodecError(Exception):
    """A value cannot be packed, or a manifest cannot be unpacked."""


class Record(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The base of all records in a manifest."""


class Span(Record, frozen=True):
    """A range of bytes of the block."""

    offset: Size
    """Bytes from the start of the block, a multiple of `ALIGNMENT`."""
    nbytes: Size
    """Its length in bytes."""


class Tensor(Record, frozen=True, tag="tensor"):
    """A dense `torch.Tensor`."""

    dtype: Name
    """The name in `torch`, such as "bfloat16"."""
    shape: Shape
    """Its dimensions; () for a scalar tensor."""
    span: Span
    """Its elements."""
    order: Order = ()
    """The order of its dimensions in the span, outermost first; () is row-major."""


class Array(Record, frozen=True, tag="array"):
    """A `numpy.ndarray`, row-major in its span."""

    dtype: Name
    """Its array-protocol string, such as "<f4"."""
    shape: Shape
    """Its dimensions."""
    scalar: bool
    """Whether it was a numpy scalar, not an array without dimensions."""
    span: Span
    """Its elements."""


class ImageRecord(Record, frozen=True, tag="image"):
    """The pixels of a `PIL.Image.Image`."""

    mode: Name
    """A Pillow mode, such as "RGB"."""
    width: Dimension
    """Pixels."""
    height: Dimension
    """Pixels."""
    span: Span
    """Its rows."""


class Bytes(Record, frozen=True, tag="bytes"):
    """A `bytes`."""

    span: Span
    """The bytes."""


class Text(Record, frozen=True, tag="text"):
    """A string that is too long for the manifest."""

    span: Span
    """The string in UTF-8."""


class Generator(Record, frozen=True, tag="generator"):
    """A `torch.Generator` with its state."""

    device: Name
    """The type of its device: "cpu" or "cuda"."""
    span: Span
    """Its state, uint8."""


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
    """The first index, or None."""
    stop: Bound
    """The index after the last, or None."""
    step: Bound
    """The step, or None."""


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
    """The values of a payload."""

    version: int
    """The `VERSION` of the sender."""
    nbytes: Size
    """The number of bytes of the block in use."""
    values: Dict
    """The values by name."""


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Manifest)


def encode(manifest: Manifest) -> bytes:
    """Encode a manifest as msgpack.

    Raises:
        CodecError: The manifest is longer than `MAX_MANIFEST_BYTES`, or has text that is not valid Unicode.
    """
    try:
        data = _ENCODER.encode(manifest)
    except UnicodeEncodeError as error:
        raise CodecError(f"The payload holds text that is not valid Unicode: {error}.") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise CodecError(
            f"The manifest of the payload takes {len(data)} bytes, more than the {MAX_MANIFEST_BYTES} of a"
            " message: put long lists of numbers into a tensor."
        )
    return data


def decode(data: bytes) -> Manifest:
    """Decode a manifest from bytes that are not trusted.

    Raises:
        CodecError: The bytes are not a manifest of this version.
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
