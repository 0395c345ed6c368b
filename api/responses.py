"""JSON answers."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from starlette.responses import Response


class JSONResponse(Response):
    """A JSON body; takes dicts, lists and scalars, and object-like structs, whose `bytes` become base64."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Encode the body."""
        return msgspec.json.encode(content)


_PLAIN: Final = frozenset({str, int, float, bool, bytes, type(None)})


def to_builtins(value: object) -> Any:
    """Turn bus messages into dicts by field name; on the wire they are arrays."""
    if type(value) in _PLAIN:  # most are
        return value
    if isinstance(value, msgspec.Struct):
        return {field: to_builtins(getattr(value, field)) for field in value.__struct_fields__}
    if isinstance(value, dict):
        return {key: to_builtins(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_builtins(item) for item in value]
    return value
