"""GET /v1/images/{name}: finished media, by the names that responses carry."""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from triptych.api.conditional_requests import precondition, wanted_ranges
from triptych.api.errors import ApiError, not_found
from triptych.api.head_client import HeadClient
from triptych.bus import RemoteError
from triptych.roles.media.artifacts import ArtifactError, ArtifactMissingError, ArtifactStore
from triptych.roles.media.formats import CONTENT_TYPES
from triptych.roles.messages.requests import QueryRequest, RequestView

GONE: Final = 410


async def get_artifact(request: Request) -> Response:
    """Answer with the file, which never changes under its name."""
    name = request.path_params["name"]
    if owner := request.state.owner:
        # Whose it is, the head knows; an artifact without its request is nobody's.
        head: HeadClient = request.app.state.head
        try:
            await head.ask(QueryRequest(name.rpartition("_")[0], owner), RequestView)
        except RemoteError as error:
            if error.code != "not_found":
                raise
            raise not_found(f"there is no file {name}") from None
    try:
        return await send_file(request, name)
    except ApiError as error:
        if error.status == GONE and not await _head_has_artifact(request, name):
            raise not_found(f"there is no file {name}") from None
        raise


async def _head_has_artifact(request: Request, name: str) -> bool:
    """Whether a request that the head knows has made an artifact of that name."""
    head: HeadClient = request.app.state.head
    try:
        view = await head.ask(QueryRequest(name.rpartition("_")[0], request.state.owner), RequestView)
    except RemoteError as error:
        if error.code != "not_found":
            raise
        return False
    return any(job.artifact is not None and job.artifact.name == name for job in view.units)


def artifact_expired(name: str) -> ApiError:
    """Make a 410."""
    message = f"the file {name} is not kept any more: send the request again, under another Idempotency-Key if any"
    return ApiError(GONE, message, code="artifact_expired")


async def read_file(request: Request, name: str) -> bytes:
    """Read an artifact that was made; raises ApiError 410 once it is not kept any more."""
    store: ArtifactStore = request.app.state.artifacts
    try:
        return await asyncio.to_thread(store.read, name)
    except ArtifactMissingError:
        raise artifact_expired(name) from None


async def send_file(request: Request, name: str) -> Response:
    """Make the response that is an artifact, a part of it, or 304; raises ApiError 404, 410, 412, 416."""
    store: ArtifactStore = request.app.state.artifacts
    try:
        path = store.path(name)
        found = await asyncio.to_thread(path.stat)
    except ArtifactError:
        raise not_found(f"there is no file {name}") from None
    except FileNotFoundError:
        raise artifact_expired(name) from None
    headers = {"Cache-Control": "private, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
    media_type = CONTENT_TYPES[path.suffix[1:]]
    response = FileResponse(path, media_type=media_type, headers=headers, stat_result=found)
    etag, modified = response.headers["etag"], response.headers["last-modified"]
    match precondition(request.headers, etag, modified):
        case 304:
            return Response(status_code=304, headers={**headers, "ETag": etag, "Last-Modified": modified})
        case 412:
            raise ApiError(412, "the file is not the one of If-Match or If-Unmodified-Since", code="changed")
    ranges = wanted_ranges(request.headers, etag, modified, found.st_size) if request.method == "GET" else ""
    if ranges is None:
        error = ApiError(416, f"the file has {found.st_size} bytes, and none of those asked for", code="no_such_range")
        error.headers["Content-Range"] = f"bytes */{found.st_size}"
        raise error
    asked = MutableHeaders(scope=request.scope)  # which the response reads
    if ranges:
        asked["range"] = ranges
    else:
        del asked["range"]
    return response
