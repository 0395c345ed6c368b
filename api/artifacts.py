"""GET /v1/images/{name}: finished media, by the names that responses carry."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from api.errors import not_found
from roles.artifacts import ArtifactError, ArtifactStore
from roles.formats import CONTENT_TYPES


def artifact_url(request: Request, name: str) -> str:
    """Tell where the client that made this request can get the artifact."""
    return str(request.url_for("artifact", name=name))


async def artifact(request: Request) -> Response:
    """Answer with the file, which never changes under its name."""
    return await send_file(request, request.path_params["name"])


async def send_file(request: Request, name: str) -> Response:
    """Make the response that is an artifact; raises ApiError 404."""
    store: ArtifactStore = request.app.state.artifacts
    try:
        path = store.path(name)
    except ArtifactError:
        raise not_found(f"no such file: {name}") from None
    if not await asyncio.to_thread(path.is_file):
        raise not_found(f"no such file: {name}")
    headers = {"Cache-Control": "private, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
    return FileResponse(path, media_type=CONTENT_TYPES[path.suffix[1:]], headers=headers)
