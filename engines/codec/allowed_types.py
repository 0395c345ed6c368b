"""What the codec can carry: closed lists of dtypes, image modes and dataclasses, alike on both sides."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Final, TypeVar

import torch

from triptych.engines.codec.manifest import CodecError

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
"""Name in `torch` to dtype, of tensors that can cross."""
DTYPE_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
ALL_DTYPES: Final[dict[str, torch.dtype]] = {
    str(dtype).removeprefix("torch."): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)
}
"""Name to dtype, of dtypes that can cross as values."""

_ARRAY_KINDS: Final = ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
ARRAY_DTYPES: Final = frozenset(("|b1", "|i1", "|u1", *(order + kind for order in "<>" for kind in _ARRAY_KINDS)))
"""Array-protocol strings of numpy arrays that can cross; no objects, no records, no text."""
BITS_PER_PIXEL: Final = {
    "1": 1, "L": 8, "LA": 16, "RGB": 24, "RGBA": 32, "RGBX": 32, "CMYK": 32,
    "YCbCr": 24, "LAB": 24, "HSV": 24, "I": 32, "F": 32, "I;16": 16,
}  # fmt: skip
"""Pillow modes that are fully described by their pixels (a palette image is not)."""

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
    """Put a dataclass on the allow-list of this process; usable as a decorator. Both sides have to do so.

    Raises:
        TypeError: It is not a dataclass.

    """
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__qualname__} is not a dataclass")
    _registered[qualified_name(cls)] = cls
    return cls


def name_of_dataclass(value: object) -> str | None:
    """Return the name that an instance crosses by, None where its class is not on the allow-list."""
    if not dataclasses.is_dataclass(value):
        return None
    name = qualified_name(type(value))
    return name if name in _registered or name in _KNOWN else None


def find_dataclass(name: str) -> type:
    """Find a dataclass on the allow-list; those of diffusers are imported when they are first needed.

    Raises:
        CodecError: There is none.

    """
    if name in _registered:
        return _registered[name]
    if name not in _KNOWN:
        raise CodecError(f"{name} is not a dataclass that may cross between stages.")
    module, _, attribute = name.rpartition(".")
    found: type = getattr(importlib.import_module(module), attribute)
    return found


def image_bytes(mode: str, width: int, height: int) -> int:
    """Count the bytes of an image's pixels, each row padded to whole bytes.

    Raises:
        CodecError: Images of that mode or without pixels do not cross.

    """
    if mode not in BITS_PER_PIXEL:
        raise CodecError(f'an image of mode "{mode}" cannot cross: convert it to RGB.')
    if not width * height:
        raise CodecError("an image without pixels cannot cross.")
    return (width * BITS_PER_PIXEL[mode] + 7) // 8 * height


def qualified_name(cls: type) -> str:
    """Name a class in full."""
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"
