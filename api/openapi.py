"""GET /openapi.json: the paths by hand, the request body from its struct."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request

from api.encoding import JSONResponse
from api.generations import ImageRequest

_PATHS: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "/v1/images/generations": {
        "post": ("Make pictures and wait for them", (200, 400, 404, 409, 413, 415, 422, 429, 500, 503, 504))
    },
    "/v1/images/{name}": {"get": ("A finished picture", (200, 404))},
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
            str(status): {"description": "OK"} if status == 200 else {"description": "Error", **error}
            for status in statuses
        },
    }
    names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return operation


def document() -> dict[str, Any]:
    """Write the OpenAPI 3.1 document."""
    _, schemas = msgspec.json.schema_components([ImageRequest], ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {
        path: {method: _operation(path, *entry) for method, entry in methods.items()}
        for path, methods in _PATHS.items()
    }
    paths["/v1/images/generations"]["post"]["requestBody"] = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ImageRequest"}}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Triptych", "version": "1"},
        "paths": paths,
        "components": {"schemas": {**schemas, "Error": _ERROR}},
    }


async def openapi(_: Request) -> JSONResponse:
    """Answer with the document."""
    return JSONResponse(document())
