"""GET /v1/images/{name}: finished media, by the names that responses carry."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from api.errors import not_found
from api.head import Head
from bus import RemoteFailure
from roles.artifacts import ArtifactError, ArtifactStore
from roles.formats import CONTENT_TYPES
from roles.messages.requests import QueryRequest, RequestView


async def artifact(request: Request) -> Response:
    """Answer with the file, which never changes under its name."""
    name = request.path_params["name"]
    if owner := request.state.owner:
        # Whose it is, the head knows; an artifact without its request is nobody's.
        head: Head = request.app.state.head
        try:
            await head.ask(QueryRequest(name.rpartition("_")[0], owner), RequestView)
        except RemoteFailure as error:
            if error.code != "not_found":
                raise
            raise not_found(f"no such file: {name}") from None
    return await send_file(request, name)


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
