"""JSON answers, and the URLs in them."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.responses import Response

from triptych.api.services import ApiRequest


class JSONResponse(Response):
    """A JSON body; takes dicts, lists and scalars, and object-like structs, whose `bytes` become base64."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        """Encode the body."""
        return msgspec.json.encode(content)


def to_builtins(value: object) -> Any:
    """Turn bus messages into dicts by field name; on the wire they are arrays."""
    if isinstance(value, msgspec.Struct):
        return {field: to_builtins(getattr(value, field)) for field in value.__struct_fields__}
    if isinstance(value, dict):
        return {key: to_builtins(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_builtins(item) for item in value]
    return value


def url_of(request: ApiRequest, path: str) -> str:
    """Return the URL of a path; it starts with `[api] public_url`, else where the client connected."""
    public_url = request.state["services"].topology.api.public_url
    return (public_url or str(request.base_url)).rstrip("/") + path


def request_url(request: ApiRequest, request_id: str) -> str:
    """Return the URL of a request."""
    return url_of(request, f"/v1/requests/{request_id}")


def artifact_url(request: ApiRequest, name: str) -> str:
    """Return the URL of an artifact."""
    return url_of(request, f"/v1/images/{name}")
