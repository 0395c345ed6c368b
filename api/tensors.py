"""The check of a safetensors file that a client sends. Imports no torch."""

from __future__ import annotations

from typing import Final

import safetensors
from safetensors import SafetensorError

from triptych.api.errors import field_error

MAX_HEADER_BYTES: Final = 1 << 16
MAX_TENSORS: Final = 32
MAX_DIMENSIONS: Final = 8
MAX_NAME: Final = 128
DTYPES: Final = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"})


def check_safetensors(data: bytes, param: str) -> tuple[str, ...]:
    """Check a safetensors file; returns the names of its tensors, in order.

    Args:
        data: Its bytes.
        param: What a refusal names.

    Raises ApiError 422: it is no such file, its offsets do not cover its bytes, or there is a tensor of another dtype,
    without elements or of too many dimensions.
    """
    # Its first 8 bytes say how long the header is, which is JSON; the library's own bound is far higher.
    if len(data) < 8 or int.from_bytes(data[:8], "little") > MAX_HEADER_BYTES:
        raise field_error(param, f"must be a safetensors file, with a header of at most {MAX_HEADER_BYTES} bytes")
    try:
        found = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise field_error(param, f"must be a safetensors file ({error})") from None
    if not 0 < len(found) <= MAX_TENSORS:
        raise field_error(param, f"must have 1 to {MAX_TENSORS} tensors, not {len(found)}")
    for name, tensor in found:
        shape, dtype = tensor["shape"], tensor["dtype"]
        if not 0 < len(name) <= MAX_NAME:
            raise field_error(param, f"has a tensor whose name is not 1 to {MAX_NAME} characters long")
        if dtype not in DTYPES:
            raise field_error(param, f"has {name} of dtype {dtype}, which must be one of {', '.join(sorted(DTYPES))}")
        if not 0 < len(shape) <= MAX_DIMENSIONS or 0 in shape:
            wanted = f"1 to {MAX_DIMENSIONS} sizes above 0"
            raise field_error(param, f"has {name} of shape {list(shape)}, which must be {wanted}")
    return tuple(sorted(name for name, _ in found))
