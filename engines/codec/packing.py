"""The sending half of the codec: describe the values of a payload, lay out the bytes of those with a body."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Final, cast

import numpy as np
import torch
from PIL import Image

from triptych.engines.codec import allowed_types
from triptych.engines.codec import manifest as m
from triptych.engines.codec.allowed_types import qualified_name
from triptych.engines.codec.manifest import ALIGNMENT, MAX_DEPTH, CodecError

_LONG_TEXT: Final = 4096
_MAX_DIGITS: Final = 4096


class Packer:
    """Walks one payload.

    Attributes:
        tensors: The bytes of each span so far, 1-D uint8, on their own devices.
        offsets: Where each of them goes, in bytes.
        nbytes: Where the last of them ends.

    """

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.offsets: list[int] = []
        self.nbytes = 0

    def payload(self, values: dict[str, object]) -> m.Dict:
        """Describe a whole payload.

        Raises:
            CodecError: A value cannot cross; the message names its path and its type.

        """
        return self._mapping(values, "state", 0)

    def _value(self, value: object, path: str, depth: int) -> m.Node:
        # Exact types: a subclass (a NamedTuple, an IntEnum, a Parameter) would arrive as its plain base.
        pack_as = _PACKERS.get(type(value))
        if pack_as is not None:
            return pack_as(self, value, path, depth)
        if isinstance(value, (np.ndarray, np.generic)):
            return self._array(value, path)
        if isinstance(value, Image.Image):
            return self._image(value, path)
        name = allowed_types.name_of_dataclass(value)
        if name is not None:
            return self._instance(value, name, path, depth)
        raise CodecError(f"{path} is a {qualified_name(type(value))}, which cannot cross between stages.")

    def _scalar(self, value: Any, path: str, depth: int) -> m.Node:
        return cast("m.Node", value)

    def _integer(self, value: int, path: str, depth: int) -> m.Node:
        if -(2**63) <= value < 2**64:
            return value
        digits = hex(value)
        if len(digits) > _MAX_DIGITS:
            raise CodecError(f"{path} is an int of {value.bit_length()} bits, which is too long to cross.")
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
            raise CodecError(f"{path} is {value!r}, and only a slice of integers can cross.")
        return m.Slice(*bounds)

    def _generator(self, value: torch.Generator, path: str, depth: int) -> m.Node:
        return m.Generator(value.device.type, self._span(value.get_state()))

    def _tensor(self, value: torch.Tensor, path: str, depth: int) -> m.Node:
        name = allowed_types.DTYPE_NAMES.get(value.dtype)
        if name is None or value.layout is not torch.strided or value.is_meta or value.is_nested:
            kind = f"{value.dtype} ({value.layout}, {value.device})"
            raise CodecError(f"{path} is a torch.Tensor of {kind}, which cannot cross between stages.")
        dense = value.detach().resolve_conj().resolve_neg()
        if dense.element_size() == 1:
            dense = dense.view(torch.uint8)  # Some one-byte dtypes cannot be copied as themselves.
        order = _memory_order(dense)
        flat = dense.permute(order or tuple(range(dense.dim()))).contiguous().reshape(-1)
        # A single element that was expanded counts as contiguous with a stride of 0, but cannot be viewed as bytes.
        data = flat.as_strided(flat.shape, (1,)).view(torch.uint8)
        return m.Tensor(name, tuple(value.shape), self._span(data), order)

    def _array(self, value: np.ndarray[Any, Any] | np.generic, path: str) -> m.Node:
        scalar = isinstance(value, np.generic)
        if value.dtype.str not in allowed_types.ARRAY_DTYPES or not (scalar or type(value) is np.ndarray):
            raise CodecError(f"{path} is a {qualified_name(type(value))} of {value.dtype}, which cannot cross.")
        return m.Array(value.dtype.str, tuple(value.shape), scalar, self._raw(value.tobytes()))

    def _image(self, value: Image.Image, path: str) -> m.Node:
        try:
            allowed_types.image_bytes(value.mode, value.width, value.height)
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
    """How the dimensions of a dense tensor lie in memory, the outermost first; () for row-major, and for the rest."""
    # A tensor that arrives in another order ("channels last" from a VAE) has the same elements, but convolutions
    # choose another kernel for it and round otherwise.
    if tensor.is_contiguous():
        return ()
    strides = tensor.stride()
    # Of equal strides that of a single element is the inner one, so that it is the same again on the other side: by it
    # too "channels last" is told from other orders.
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
    raise CodecError(f"{path} has the key {key!r} of type {qualified_name(type(key))}, which cannot cross.")
