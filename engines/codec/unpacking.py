"""The receiving half of the codec: rebuild a payload from a block and a manifest that is not trusted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final, cast

import numpy as np
import torch
from PIL import Image

from triptych.engines.codec import allowed_types
from triptych.engines.codec import manifest as m
from triptych.engines.codec.manifest import ALIGNMENT, MAX_DEPTH, CodecError


class Unpacker:
    """Reads one block.

    Args:
        memory: The part of the block that is in use, uint8, shape [bytes], on the CPU.
        device: Where tensors go.
        owned: Whether tensors on the CPU may be views of `memory`.

    """

    def __init__(self, memory: torch.Tensor, device: torch.device, *, owned: bool = False) -> None:
        self.memory = memory
        self.device = device
        self.owned = owned
        self.end = 0

    def payload(self, node: m.Dict) -> dict[str, object]:
        """Rebuild a whole payload.

        Raises:
            CodecError: A record does not fit the block, or names something that cannot cross.

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
        return _named(allowed_types.ALL_DTYPES, node.name)

    def _slice(self, node: m.Slice, depth: int) -> slice:
        return slice(node.start, node.stop, node.step)

    def _generator(self, node: m.Generator, depth: int) -> torch.Generator:
        if node.device not in ("cpu", self.device.type):
            raise CodecError(f'A generator of a "{node.device}" device cannot be used on {self.device}.')
        payload = self._span(node.span).clone()
        try:
            return torch.Generator("cpu" if node.device == "cpu" else self.device).set_state(payload)
        except RuntimeError as error:
            raise CodecError(f"The payload of a generator is not valid: {error}") from error

    def _tensor(self, node: m.Tensor, depth: int) -> torch.Tensor:
        dtype = _named(allowed_types.DTYPES, node.dtype)
        _check_size(node.shape, dtype.itemsize, node.span.nbytes)
        elements = self._owned(self._span(node.span)).view(dtype)
        if not node.order:
            return elements.reshape(node.shape)
        dimensions = range(len(node.shape))
        if sorted(node.order) != list(dimensions):
            raise CodecError(f"{node.order} is no order of {len(node.shape)} dimensions.")
        in_memory = elements.reshape([node.shape[dimension] for dimension in node.order])
        return in_memory.permute([node.order.index(dimension) for dimension in dimensions])

    def _array(self, node: m.Array, depth: int) -> object:
        if node.dtype not in allowed_types.ARRAY_DTYPES or (node.scalar and node.shape):
            raise CodecError(f"An array of {node.dtype!r} and shape {node.shape} cannot cross.")
        dtype: np.dtype[Any] = np.dtype(node.dtype)
        _check_size(node.shape, dtype.itemsize, node.span.nbytes)
        data: np.ndarray[Any, Any] = np.ndarray(node.shape, dtype, bytearray(self._raw(node.span)))
        return data[()] if node.scalar else data

    def _image(self, node: m.ImageRecord, depth: int) -> Image.Image:
        if allowed_types.image_bytes(node.mode, node.width, node.height) != node.span.nbytes:
            size = f"{node.width}x{node.height}"
            raise CodecError(f"An image of mode {node.mode}, {size}, does not take {node.span.nbytes} bytes.")
        return Image.frombytes(node.mode, (node.width, node.height), self._raw(node.span))

    def _list(self, node: m.List, depth: int) -> list[object]:
        _check_depth(depth)
        return [self._value(item, depth + 1) for item in node.items]

    def _tuple(self, node: m.Tuple, depth: int) -> tuple[object, ...]:
        _check_depth(depth)
        return tuple(self._value(item, depth + 1) for item in node.items)

    def _mapping(self, node: m.Dict, depth: int) -> dict[m.Key, object]:
        _check_depth(depth)
        return {key: self._value(item, depth + 1) for key, item in node.items}

    def _instance(self, node: m.Dataclass, depth: int) -> object:
        _check_depth(depth)
        cls = allowed_types.find_dataclass(node.name)
        fields = {name: self._value(item, depth + 1) for name, item in node.fields}
        try:
            return cls(**fields)
        except (TypeError, ValueError) as error:
            raise CodecError(f"{node.name} cannot be made of {sorted(fields)}: {error}") from error

    def _owned(self, data: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cpu":
            return data if self.owned else data.clone()
        return data.to(self.device, non_blocking=self.memory.is_pinned())

    def _raw(self, span: m.Span) -> bytes:
        return self._span(span).numpy().tobytes()

    def _span(self, span: m.Span) -> torch.Tensor:
        end = span.offset + span.nbytes
        # Spans come in order and never overlap, so a small block cannot be made to fill the memory.
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


def _check_depth(depth: int) -> None:
    if depth >= MAX_DEPTH:
        raise CodecError(f"The manifest is nested deeper than {MAX_DEPTH} levels.")


def _check_size(shape: tuple[int, ...], itemsize: int, nbytes: int) -> None:
    # A dimension of 0 hides the others from the product, and their strides could still overflow.
    if math.prod(max(size, 1) for size in shape) >= 2**62 or math.prod(shape) * itemsize != nbytes:
        raise CodecError(f"The shape {shape} with {itemsize} bytes an element does not take {nbytes} bytes.")


def _named(names: dict[str, torch.dtype], name: str) -> torch.dtype:
    if name not in names:
        raise CodecError(f"{name!r} is not a dtype that can cross.")
    return names[name]
