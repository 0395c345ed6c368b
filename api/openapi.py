"""GET /openapi.json: the paths by hand, the request bodies from their structs."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request

from api.encoding import JSONResponse
from api.fields import MediaRequest
from api.generations import ImageRequest
from api.videos import Video, VideoRequest

_MADE = (200, 202, 400, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504)

_GOOD = {200: "OK", 202: "Accepted, where the client said Prefer: respond-async: follow it at its Location"}

_PATHS: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "/v1/images/generations": {"post": ("Make pictures of a prompt, and of pictures, and wait for them", _MADE)},
    "/v1/images/edits": {"post": ("Make pictures of a picture, within a mask or all over, and wait for them", _MADE)},
    "/v1/images/{name}": {"get": ("A finished picture", (200, 404))},
    "/v1/videos": {"post": ("Begin a video", (200, 400, 404, 408, 409, 413, 415, 422, 429, 503))},
    "/v1/videos/{video_id}": {
        "get": ("How far a video is", (200, 404, 503)),
        "delete": ("Cancel a video", (200, 404, 503)),
    },
    "/v1/videos/{video_id}/content": {"get": ("The finished file; 409 while there is none", (200, 404, 409, 503))},
    "/v1/models": {"get": ("The model that is served", (200, 503))},
    "/v1/models/{name}": {"get": ("One model: what it takes, and its defaults", (200, 404, 503))},
    "/v1/requests/{request_id}": {
        "get": ("A request: state, history, attempts, causes, artifacts", (200, 404, 503)),
        "delete": ("Cancel a request", (200, 404, 503)),
    },
    "/v1/cluster": {"get": ("Every actor, pool and dead letter", (200,))},
    "/live": {"get": ("The API process answers", (200,))},
    "/ready": {"get": ("Pictures can be made now", (200, 503))},
    "/health": {"get": ("Summary of the system", (200, 503))},
}

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def _operation(path: str, summary: str, statuses: tuple[int, ...]) -> dict[str, Any]:
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": {
            str(status): {"description": _GOOD[status]} if status in _GOOD else {"description": "Error", **error}
            for status in statuses
        },
    }
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return operation


_PICTURE = "A picture, PNG, JPEG or WebP: base64 or a data URL in JSON, a file in a form; or several of them."


def _inputs(**pictures: str) -> dict[str, Any]:
    """Describe pictures in a form, by name."""
    files = {"type": "array", "items": {"type": "string", "format": "binary"}}
    return {"properties": {name: {**files, "description": text} for name, text in pictures.items()}}


_BODIES: dict[str, tuple[type[MediaRequest], dict[str, Any], list[str]]] = {
    "/v1/images/generations": (
        ImageRequest,
        _inputs(image=_PICTURE, mask_image="What of the image to paint anew, white for yes."),
        [],
    ),
    "/v1/images/edits": (
        ImageRequest,
        _inputs(image=_PICTURE, mask="What of the image to paint anew: what is transparent, else what is white."),
        ["image"],
    ),
    "/v1/videos": (VideoRequest, _inputs(input_reference="The first frame.", last_image="The last frame."), []),
}


def _body(request: type[MediaRequest], pictures: dict[str, Any], required: list[str]) -> dict[str, Any]:
    own = {"$ref": f"#/components/schemas/{request.__name__}"}
    text = {"properties": {name: {"type": ["string", "array"]} for name in pictures["properties"]}}
    return {
        "required": True,
        "content": {
            "application/json": {"schema": {"allOf": [own, {**text, "required": required}]}},
            "multipart/form-data": {"schema": {"allOf": [own, {**pictures, "required": required}]}},
        },
    }


def document() -> dict[str, Any]:
    """Write the OpenAPI 3.1 document."""
    _, schemas = msgspec.json.schema_components(
        [ImageRequest, VideoRequest, Video], ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, Any] = {
        path: {method: _operation(path, *entry) for method, entry in methods.items()}
        for path, methods in _PATHS.items()
    }
    for path, body in _BODIES.items():
        paths[path]["post"]["requestBody"] = _body(*body)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Triptych", "version": "1"},
        "paths": paths,
        "components": {"schemas": {**schemas, "Error": _ERROR}},
    }


async def openapi(_: Request) -> JSONResponse:
    """Answer with the document."""
    return JSONResponse(document())
