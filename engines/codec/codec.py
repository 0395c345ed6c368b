"""Pack the values that cross between stages into one block of bytes and a manifest, and unpack them, without pickle.

A payload is a dict of tensors, numbers, text, bytes, slices, images, arrays, generators and containers of those. A
value of any other type is refused with its path and its type: if it were left out, the image would be wrong without
an error. Of an image only the pixels are packed; of a tensor neither its gradient nor its aliases.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any, Final, TypeVar, cast

import numpy as np
import torch
from PIL import Image

from triptych.engines.codec import manifest as m
from triptych.engines.codec.manifest import ALIGNMENT, MAX_DEPTH, CodecError

__all__ = ["ALIGNMENT", "CodecError", "Packed", "pack", "register_dataclass", "unpack"]

_LONG_TEXT: Final = 4096
_MAX_DIGITS: Final = 4096


@dataclasses.dataclass(frozen=True)
class Packed:
    """A packed payload, ready to be copied into a block.

    Attributes:
        manifest: The description of the block's content, msgpack, for `unpack`.
        tensors: The bytes of each span: uint8, shape [nbytes of the span], on the devices of their values; views of
            values that are dense.
        offsets: The offset of each span in bytes from the start of the block, ascending multiples of `ALIGNMENT`.
        nbytes: The number of bytes of the block in use.
    """

    manifest: bytes
    tensors: tuple[torch.Tensor, ...]
    offsets: tuple[int, ...]
    nbytes: int

    def copy_to(self, memory: torch.Tensor, *, non_blocking: bool = False) -> None:
        """Copy the payload into a block and zero the gaps between spans, so that no older bytes leak.

        Args:
            memory: The block: uint8, shape [at least `nbytes`], dense, on the CPU.
            non_blocking: Whether to copy asynchronously from a device to pinned memory; the caller then waits for the
                stream.

        Raises:
            CodecError: The block is too small, or is not dense uint8 memory on the CPU.
        """
        _check_memory(memory)
        if memory.numel() < self.nbytes:
            raise CodecError(f"The payload takes {self.nbytes} bytes, but the block has {memory.numel()}.")
        end = 0
        for offset, tensor in zip(self.offsets, self.tensors, strict=True):
            memory[end:offset].zero_()
            end = offset + tensor.numel()
            memory[offset:end].copy_(tensor, non_blocking=non_blocking)


def pack(values: dict[str, object]) -> Packed:
    """Pack a payload; tensors that are dense are not copied.

    Args:
        values: The values by name; see the module for the types that can be packed.

    Raises:
        CodecError: A value cannot be packed; the message has its path and its type.
    """
    packer = Packer()
    root = packer.pack(values)
    manifest = m.encode(m.Manifest(m.VERSION, packer.nbytes, root))
    return Packed(manifest, tuple(packer.tensors), tuple(packer.offsets), packer.nbytes)


def unpack(manifest: bytes, memory: torch.Tensor, device: torch.device, *, owned: bool = False) -> dict[str, object]:
    """Unpack a payload. The values own their memory, so that the block may be reused afterwards.

    Args:
        manifest: `Packed.manifest`; it is not trusted.
        memory: The block: uint8, shape [nbytes], dense, on the CPU. If it is pinned and `device` is an accelerator, the
            copies are asynchronous on the current stream: release the block after that stream has passed them.
        device: The device of the tensors. Arrays, images and generators of the CPU stay on the CPU.
        owned: Whether `memory` belongs to these values alone; tensors on the CPU are then views of it.

    Raises:
        CodecError: The manifest cannot be read, or does not fit the block.
    """
    _check_memory(memory)
    content = m.decode(manifest)
    if content.nbytes > memory.numel():
        raise CodecError(f"The manifest describes {content.nbytes} bytes, but the block has {memory.numel()}.")
    return Unpacker(memory[: content.nbytes], torch.device(device), owned=owned).unpack(content.values)


def _check_memory(memory: torch.Tensor) -> None:
    flat = memory.dtype is torch.uint8 and memory.dim() == 1 and memory.is_contiguous()
    if not flat or memory.device.type != "cpu":
        raise CodecError(f"A block is a dense uint8 tensor [bytes] on the CPU, not {memory.dtype}.")


# Allowed types ------------------------------------------------------------------------------------

_TENSOR_DTYPES: Final = (
    *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *(
        "float8_e4m3fn",
        "float8_e4m3fnuz",
        "float8_e5m2",
        "float8_e5m2fnuz",
        "float8_e8m0fnu",
        "float4_e2m1fn_x2",
    ),
)
# Quantized and sub-byte dtypes are left out: they have no plain bytes, and viewing one can end the process.
DTYPES: Final[dict[str, torch.dtype]] = {name: getattr(torch, name) for name in _TENSOR_DTYPES if hasattr(torch, name)}
"""The dtypes of tensors that can be packed, by their name in `torch`."""
DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
ALL_DTYPES: Final[dict[str, torch.dtype]] = {
    str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}
"""The dtypes that can be packed as values, by their name in `torch`."""

_ARRAY_KINDS: Final = ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
ARRAY_DTYPES: Final = frozenset(("|b1", "|i1", "|u1", *(order + kind for order in "<>" for kind in _ARRAY_KINDS)))
"""The numpy dtypes that can be packed, as array-protocol strings: no objects, records or text."""
BITS_PER_PIXEL: Final = {
    "1": 1, "L": 8, "LA": 16, "RGB": 24, "RGBA": 32, "RGBX": 32, "CMYK": 32,
    "YCbCr": 24, "LAB": 24, "HSV": 24, "I": 32, "F": 32, "I;16": 16,
}  # fmt: skip
"""The Pillow modes that can be packed: those that pixels describe completely (a palette is not among them)."""

_REFERENCES: Final = "diffusers.modular_pipelines.minimax_h3.references.MiniMaxH3"
_KNOWN: Final = frozenset(
    (
        *(f"{_REFERENCES}{kind}Reference" for kind in ("Image", "Video", "Audio")),
        "diffusers.pipelines.cosmos.pipeline_cosmos3_omni.CosmosActionCondition",
        "diffusers.pipelines.ltx2.pipeline_ltx2_condition.LTX2VideoCondition",
        "diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora.LTX2ReferenceCondition",
    )
)
_registered: dict[str, type] = {}
_Class = TypeVar("_Class", bound=type)


def register_dataclass(cls: _Class) -> _Class:
    """Allow a dataclass to be packed and unpacked in this process; usable as a decorator.

    The sender and the receiver must both register it.

    Raises:
        TypeError: The class is not a dataclass.
    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__qualname__} is not a dataclass")
    _registered[qualified_name(cls)] = cls
    return cls


def name_of_dataclass(value: object) -> str | None:
    """Return the name of a value's dataclass in a manifest; None if it may not be packed."""
    if not dataclasses.is_dataclass(value):
        return None
    name = qualified_name(type(value))
    return name if name in _registered or name in _KNOWN else None


def find_dataclass(name: str) -> type:
    """Return the allowed dataclass of that name; those of diffusers are imported on first use.

    Raises:
        CodecError: No dataclass of that name is allowed.
    """
    if name in _registered:
        return _registered[name]
    if name not in _KNOWN:
        raise CodecError(f"{name} is not a dataclass that may be sent between stages.")
    module, _, attribute = name.rpartition(".")
    found: type = getattr(importlib.import_module(module), attribute)
    return found


def image_bytes(mode: str, width: int, height: int) -> int:
    """Return the number of bytes of an image's pixels, with each row padded to whole bytes.

    Raises:
        CodecError: The mode is not allowed, or the image has no pixels.
    """
    if mode not in BITS_PER_PIXEL:
        raise CodecError(f'an image of mode "{mode}" cannot be packed: convert it to RGB.')
    if not width * height:
        raise CodecError("an image without pixels cannot be packed.")
    return (width * BITS_PER_PIXEL[mode] + 7) // 8 * height


def qualified_name(cls: type) -> str:
    """Return the name of a class with its module."""
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


# Packing ------------------------------------------------------------------------------------------


class Packer:
    """Packs one payload.

    Attributes:
        tensors: The bytes of each span so far: uint8, shape [nbytes of the span], on the devices of their values.
        offsets: The offset of each span in bytes.
        nbytes: The end of the last span in bytes.
    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.offsets: list[int] = []
        self.nbytes = 0

    def pack(self, values: dict[str, object]) -> m.Dict:
        """Describe a payload and collect its spans.

        Raises:
            CodecError: A value cannot be packed; the message has its path and its type.
        """
        return self._mapping(values, "payload", 0)

    def _value(self, value: object, path: str, depth: int) -> m.Node:
        # Look up the exact type: a subclass (a NamedTuple, an IntEnum, a Parameter) would be unpacked as its base.
        pack_as = _PACKERS.get(type(value))
        if pack_as is not None:
            return pack_as(self, value, path, depth)
        if isinstance(value, (np.ndarray, np.generic)):
            return self._array(value, path)
        if isinstance(value, Image.Image):
            return self._image(value, path)
        name = name_of_dataclass(value)
        if name is not None:
            return self._instance(value, name, path, depth)
        raise CodecError(f"{path} is a {qualified_name(type(value))}, which cannot be packed.")

    def _scalar(self, value: Any, path: str, depth: int) -> m.Node:
        return cast("m.Node", value)

    def _integer(self, value: int, path: str, depth: int) -> m.Node:
        if -(2**63) <= value < 2**64:
            return value
        digits = hex(value)
        if len(digits) > _MAX_DIGITS:
            raise CodecError(f"{path} is an int of {value.bit_length()} bits, which is too long to be packed.")
        return m.BigInteger(digits)

    def _text(self, value: str, path: str, depth: int) -> m.Node:
        try:
            data = value.encode()
        except UnicodeEncodeError as error:
            raise CodecError(f"{path} is a str that is not valid Unicode: {error}.") from error
        return value if len(data) <= _LONG_TEXT else m.Text(self._raw(data))

    def _bytes(self, value: bytes, path: str, depth: int) -> m.Node:
        return m.Bytes(self._raw(value))

    def _dtype(self, value: torch.dtype, path: str, depth: int) -> m.Node:
        return m.DType(str(value).removeprefix("torch."))

    def _slice(self, value: slice, path: str, depth: int) -> m.Node:
        bounds = (value.start, value.stop, value.step)
        if not all(bound is None or (type(bound) is int and abs(bound) <= 2**62) for bound in bounds):
            raise CodecError(f"{path} is {value!r}, but only a slice of integers can be packed.")
        return m.Slice(*bounds)

    def _generator(self, value: torch.Generator, path: str, depth: int) -> m.Node:
        return m.Generator(value.device.type, self._span(value.get_state()))

    def _tensor(self, value: torch.Tensor, path: str, depth: int) -> m.Node:
        name = DTYPE_NAMES.get(value.dtype)
        if name is None or value.layout is not torch.strided or value.is_meta or value.is_nested:
            kind = f"{value.dtype} ({value.layout}, {value.device})"
            raise CodecError(f"{path} is a torch.Tensor of {kind}, which cannot be packed.")
        dense = value.detach()
        order: tuple[int, ...] = ()
        if not dense.is_contiguous() or dense.is_conj() or dense.is_neg():
            dense = dense.resolve_conj().resolve_neg()
            if dense.element_size() == 1:
                dense = dense.view(torch.uint8)  # Some one-byte dtypes cannot be copied as themselves.
            order = _memory_order(dense)
            dense = dense.permute(order or tuple(range(dense.dim()))).contiguous()
        flat = dense.view(-1)
        if flat.numel() == 1:  # an expanded one counts as contiguous with a stride of 0, but cannot be viewed as bytes
            flat = flat.as_strided((1,), (1,))
        return m.Tensor(name, tuple(value.shape), self._span(flat.view(torch.uint8)), order)

    def _array(self, value: np.ndarray[Any, Any] | np.generic, path: str) -> m.Node:
        scalar = isinstance(value, np.generic)
        if value.dtype.str not in ARRAY_DTYPES or not (scalar or type(value) is np.ndarray):
            raise CodecError(f"{path} is a {qualified_name(type(value))} of {value.dtype}, which cannot be packed.")
        return m.Array(value.dtype.str, tuple(value.shape), scalar, self._raw(value.tobytes()))

    def _image(self, value: Image.Image, path: str) -> m.Node:
        try:
            image_bytes(value.mode, value.width, value.height)
        except CodecError as error:
            raise CodecError(f"{path}: {error}") from error
        return m.ImageRecord(value.mode, value.width, value.height, self._raw(value.tobytes()))

    def _items(self, value: list[object] | tuple[object, ...], path: str, depth: int) -> tuple[m.Node, ...]:
        _check_depth(path, depth)
        return tuple(self._value(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(value))

    def _list(self, value: list[object], path: str, depth: int) -> m.Node:
        return m.List(self._items(value, path, depth))

    def _tuple(self, value: tuple[object, ...], path: str, depth: int) -> m.Node:
        return m.Tuple(self._items(value, path, depth))

    def _mapping(self, value: dict[Any, object], path: str, depth: int) -> m.Dict:
        _check_depth(path, depth)
        items = []
        for key, item in value.items():
            items.append((_key(key, path), self._value(item, f"{path}[{key!r}]", depth + 1)))
        return m.Dict(tuple(items))

    def _instance(self, value: Any, name: str, path: str, depth: int) -> m.Node:
        _check_depth(path, depth)
        fields = []
        for field in dataclasses.fields(value):
            if field.init:
                item = self._value(getattr(value, field.name), f"{path}.{field.name}", depth + 1)
                fields.append((field.name, item))
        return m.Dataclass(name, tuple(fields))

    def _raw(self, data: bytes) -> m.Span:
        if not data:  # `frombuffer` takes no empty buffer.
            return self._span(torch.empty(0, dtype=torch.uint8))
        return self._span(torch.frombuffer(bytearray(data), dtype=torch.uint8))

    def _span(self, data: torch.Tensor) -> m.Span:
        offset = -(-self.nbytes // ALIGNMENT) * ALIGNMENT
        self.tensors.append(data)
        self.offsets.append(offset)
        self.nbytes = offset + data.numel()
        return m.Span(offset, data.numel())


_PACKERS: Final[dict[type, Callable[[Packer, Any, str, int], m.Node]]] = {
    type(None): Packer._scalar,
    bool: Packer._scalar,
    float: Packer._scalar,
    int: Packer._integer,
    str: Packer._text,
    bytes: Packer._bytes,
    torch.dtype: Packer._dtype,
    slice: Packer._slice,
    torch.Generator: Packer._generator,
    torch.Tensor: Packer._tensor,
    list: Packer._list,
    tuple: Packer._tuple,
    dict: Packer._mapping,
}


def _memory_order(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the order of a dense tensor's dimensions in memory, outermost first; () if row-major or not dense."""
    # Keep the order ("channels last" from a VAE): for another one, convolutions choose a kernel that rounds
    # differently.
    if tensor.is_contiguous():
        return ()
    strides = tensor.stride()
    # Among equal strides, put a dimension of size 1 inside, so that unpacking gives the same strides: torch tells
    # "channels last" from other orders by them, too.
    order = tuple(
        sorted(range(tensor.dim()), key=lambda dimension: (-strides[dimension], tensor.shape[dimension] == 1))
    )
    return order if tensor.permute(order).is_contiguous() else ()


def _check_depth(path: str, depth: int) -> None:
    if depth >= MAX_DEPTH:
        raise CodecError(f"{path} is nested deeper than {MAX_DEPTH} levels.")


def _key(key: object, path: str) -> m.Key:
    if key is None or type(key) in (bool, float, str) or (type(key) is int and -(2**63) <= key < 2**64):
        return cast("m.Key", key)
    raise CodecError(f"{path} has the key {key!r} of type {qualified_name(type(key))}, which cannot be packed.")


# Unpacking ----------------------------------------------------------------------------------------


class Unpacker:
    """Unpacks one payload.

    Args:
        memory: The part of the block in use: uint8, shape [nbytes], on the CPU.
        device: The device of the tensors.
        owned: Whether tensors on the CPU may be views of `memory`.
    """

    def __init__(self, memory: torch.Tensor, device: torch.device, *, owned: bool = False) -> None:
        self.memory = memory
        self.device = device
        self.owned = owned
        self.end = 0
        self._on_cpu = device.type == "cpu"

    def unpack(self, node: m.Dict) -> dict[str, object]:
        """Return the values of a payload by name.

        Raises:
            CodecError: A record does not fit the block, or has a type that is not allowed.
        """
        values = self._mapping(node, 0)
        if not all(isinstance(name, str) for name in values):
            raise CodecError("The names in a payload must be strings.")
        return cast("dict[str, object]", values)

    def _value(self, node: m.Node, depth: int) -> object:
        unpack_as = _UNPACKERS.get(type(node))
        return node if unpack_as is None else unpack_as(self, node, depth)

    def _integer(self, node: m.BigInteger, depth: int) -> int:
        try:
            return int(node.digits, 16)
        except ValueError as error:
            raise CodecError(f"{node.digits[:32]!r} is not a hexadecimal number.") from error

    def _text(self, node: m.Text, depth: int) -> str:
        try:
            return self._raw(node.span).decode()
        except UnicodeDecodeError as error:
            raise CodecError(f"The block holds text that is not UTF-8: {error}.") from error

    def _bytes(self, node: m.Bytes, depth: int) -> bytes:
        return self._raw(node.span)

    def _dtype(self, node: m.DType, depth: int) -> torch.dtype:
        return _named(ALL_DTYPES, node.name)

    def _slice(self, node: m.Slice, depth: int) -> slice:
        return slice(node.start, node.stop, node.step)

    def _generator(self, node: m.Generator, depth: int) -> torch.Generator:
        if node.device not in ("cpu", self.device.type):
            raise CodecError(f'A generator of a "{node.device}" device cannot be used on {self.device}.')
        state = self._span(node.span).clone()
        try:
            return torch.Generator("cpu" if node.device == "cpu" else self.device).set_state(state)
        except RuntimeError as error:
            raise CodecError(f"The state of a generator is not valid: {error}") from error

    def _tensor(self, node: m.Tensor, depth: int) -> torch.Tensor:
        dtype = _named(DTYPES, node.dtype)
        _check_size(node.shape, dtype.itemsize, node.span.nbytes)
        elements = self._owned(self._span(node.span)).view(dtype)
        if not node.order:
            return elements.reshape(node.shape)
        dimensions = range(len(node.shape))
        if sorted(node.order) != list(dimensions):
            raise CodecError(f"{node.order} is not an order of {len(node.shape)} dimensions.")
        in_memory = elements.reshape([node.shape[dimension] for dimension in node.order])
        return in_memory.permute([node.order.index(dimension) for dimension in dimensions])

    def _array(self, node: m.Array, depth: int) -> object:
        if node.dtype not in ARRAY_DTYPES or (node.scalar and node.shape):
            raise CodecError(f"An array of {node.dtype!r} and shape {node.shape} cannot be unpacked.")
        dtype: np.dtype[Any] = np.dtype(node.dtype)
        _check_size(node.shape, dtype.itemsize, node.span.nbytes)
        data: np.ndarray[Any, Any] = np.ndarray(node.shape, dtype, bytearray(self._raw(node.span)))
        return data[()] if node.scalar else data

    def _image(self, node: m.ImageRecord, depth: int) -> Image.Image:
        if image_bytes(node.mode, node.width, node.height) != node.span.nbytes:
            size = f"{node.width}x{node.height}"
            raise CodecError(f"An image of mode {node.mode}, {size}, does not take {node.span.nbytes} bytes.")
        return Image.frombytes(node.mode, (node.width, node.height), self._raw(node.span))

    def _list(self, node: m.List, depth: int) -> list[object]:
        _check_manifest_depth(depth)
        return [self._value(item, depth + 1) for item in node.items]

    def _tuple(self, node: m.Tuple, depth: int) -> tuple[object, ...]:
        _check_manifest_depth(depth)
        return tuple(self._value(item, depth + 1) for item in node.items)

    def _mapping(self, node: m.Dict, depth: int) -> dict[m.Key, object]:
        _check_manifest_depth(depth)
        return {key: self._value(item, depth + 1) for key, item in node.items}

    def _instance(self, node: m.Dataclass, depth: int) -> object:
        _check_manifest_depth(depth)
        cls = find_dataclass(node.name)
        fields = {name: self._value(item, depth + 1) for name, item in node.fields}
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise CodecError(f"{node.name} cannot be made of {sorted(fields)}: {error}") from error

    def _owned(self, data: torch.Tensor) -> torch.Tensor:
        if self._on_cpu:
            return data if self.owned else data.clone()
        return data.to(self.device, non_blocking=self.memory.is_pinned())

    def _raw(self, span: m.Span) -> bytes:
        return self._span(span).numpy().tobytes()

    def _span(self, span: m.Span) -> torch.Tensor:
        end = span.offset + span.nbytes
        # Require ascending spans without overlap, so that a small block cannot be unpacked into a huge payload.
        if span.offset < self.end or span.offset % ALIGNMENT or end > self.memory.numel():
            raise CodecError(
                f"The bytes {span.offset} to {end} are not a free, aligned part of a block of"
                f" {self.memory.numel()} bytes."
            )
        self.end = end
        return self.memory[span.offset : end]


_UNPACKERS: Final[dict[type, Callable[[Unpacker, Any, int], object]]] = {
    m.BigInteger: Unpacker._integer,
    m.Text: Unpacker._text,
    m.Bytes: Unpacker._bytes,
    m.DType: Unpacker._dtype,
    m.Slice: Unpacker._slice,
    m.Generator: Unpacker._generator,
    m.Tensor: Unpacker._tensor,
    m.Array: Unpacker._array,
    m.ImageRecord: Unpacker._image,
    m.List: Unpacker._list,
    m.Tuple: Unpacker._tuple,
    m.Dict: Unpacker._mapping,
    m.Dataclass: Unpacker._instance,
}


def _check_manifest_depth(depth: int) -> None:
    if depth >= MAX_DEPTH:
        raise CodecError(f"The manifest is nested deeper than {MAX_DEPTH} levels.")


def _check_size(shape: tuple[int, ...], itemsize: int, nbytes: int) -> None:
    # Treat a dimension of 0 as 1: the product would be 0, but the strides of the others could still overflow.
    too_long = 0 in shape and math.prod(max(size, 1) for size in shape) >= 2**62
    if too_long or math.prod(shape) * itemsize != nbytes:
        raise CodecError(f"The shape {shape} with {itemsize} bytes an element does not take {nbytes} bytes.")


def _named(names: dict[str, torch.dtype], name: str) -> torch.dtype:
    if name not in names:
        raise CodecError(f"{name!r} is not a dtype that can be unpacked.")
    return names[name]
