"""GET /v1/images/{name}: finished files, under the names in responses. Conditions and ranges are RFC 9110's."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
from collections.abc import Iterator
from email.utils import formatdate, parsedate_to_datetime
from pathlib import Path
from typing import BinaryIO, Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import FileResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from triptych.api.errors import ApiError, not_found
from triptych.api.operations import FILE_ANSWERS, FILE_ERRORS, FILE_HEADERS, operation
from triptych.api.services import ApiRequest
from triptych.bus import RemoteError
from triptych.roles.media.artifacts import ArtifactError, ArtifactMissingError, ArtifactStore
from triptych.roles.media.files import Entry
from triptych.roles.media.formats import FORMATS
from triptych.roles.messages.requests import RequestView

GONE: Final = 410
_HEADERS: Final = {"Cache-Control": "private, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
_CHUNK_BYTES: Final = 1 << 18
_RANGES: Final = re.compile(r"\s*bytes\s*=(?P<ranges>[-0-9,\s]+)", re.IGNORECASE)
_RANGE: Final = re.compile(r"(?P<first>[0-9]{0,18})-(?P<last>[0-9]{0,18})")


@operation(FILE_ANSWERS, (*FILE_ERRORS, 503), headers=FILE_HEADERS)
async def get_file(request: ApiRequest) -> Response:
    """Return a finished file, which never changes under its name."""
    name = request.path_params["name"]
    # With keys, a file belongs to the owner of its request, and without its request to nobody.
    if request.state["owner"] and await _find_request(request, name) is None:
        raise not_found(f"there is no file {name}")
    try:
        return await send_file(request, name)
    except ApiError as error:
        if error.status == GONE and not await _was_made(request, name):
            raise not_found(f"there is no file {name}") from None
        raise


async def _find_request(request: ApiRequest, artifact: str) -> RequestView | None:
    """Return the request that an artifact is named after, None where the head has none."""
    try:
        return await request.state["services"].head.query(artifact.rpartition("_")[0], request.state["owner"])
    except RemoteError as error:
        if error.code != "not_found":
            raise
        return None


async def _was_made(request: ApiRequest, artifact: str) -> bool:
    view = await _find_request(request, artifact)
    return view is not None and any(
        made.name == artifact
        for job in view.units
        for made in (job.artifact, *(preview.artifact for preview in job.previews))
        if made is not None
    )


def artifact_expired(name: str) -> ApiError:
    """Make a 410."""
    message = f"the file {name} is not kept any more: send the request again, under another Idempotency-Key if any"
    return ApiError(GONE, message, code="artifact_expired")


async def read_file(request: ApiRequest, name: str) -> bytes:
    """Read an artifact that was made; raises ApiError 410 once it is not kept any more."""
    store = request.state["services"].artifacts
    try:
        return await asyncio.to_thread(store.read, name)
    except ArtifactMissingError:
        raise artifact_expired(name) from None


async def send_file(request: ApiRequest, name: str) -> Response:
    """Make the response that is an artifact, a part of it, or 304; raises ApiError 404, 410, 412, 416, 503."""
    response, size = await _file_response(request.state["services"].artifacts, name)
    etag, modified = response.headers["etag"], response.headers["last-modified"]
    match precondition(request.headers, etag, modified):
        case 304:
            return Response(status_code=304, headers={**_HEADERS, "ETag": etag, "Last-Modified": modified})
        case 412:
            raise ApiError(
                412,
                "the file has changed: get it without If-Match and If-Unmodified-Since",
                code="changed",
            )
    ranges = wanted_ranges(request.headers, etag, modified, size) if request.method == "GET" else ""
    if ranges is None:
        error = ApiError(416, f"the file has {size} bytes, and none of those asked for", code="no_such_range")
        error.headers["Content-Range"] = f"bytes */{size}"
        raise error
    asked = MutableHeaders(scope=request.scope)  # which the response reads
    if ranges:
        asked["range"] = ranges
    else:
        del asked["range"]
    return response


async def _file_response(store: ArtifactStore, name: str) -> tuple[FileResponse | ObjectResponse, int]:
    """Make the response that is an artifact, and return its size as well."""
    try:
        entry, path, found = await asyncio.to_thread(_find, store, name)
    except ArtifactMissingError:
        raise artifact_expired(name) from None
    except ArtifactError:
        raise not_found(f"there is no file {name}") from None
    media_type = FORMATS[name.rpartition(".")[2]].content_type
    if path is None:
        return ObjectResponse(store, entry, media_type), entry.nbytes
    return FileResponse(path, media_type=media_type, headers=_HEADERS, stat_result=found), entry.nbytes


def _find(store: ArtifactStore, name: str) -> tuple[Entry, Path | None, os.stat_result | None]:
    entry, path = store.stat(name), store.path(name)
    return entry, path, path.stat() if path is not None else None


class ObjectResponse(Response):
    """An artifact that no path leads to, or one range of it; of several ranges, all of it.

    Args:
        store: Has the artifact.
        entry: What the store says of it.
        media_type: Its content type.
    """

    def __init__(self, store: ArtifactStore, entry: Entry, media_type: str) -> None:
        self._store = store
        self._entry = entry
        tag = hashlib.md5(f"{entry.modified_at}-{entry.nbytes}".encode(), usedforsecurity=False).hexdigest()
        modified = formatdate(entry.modified_at, usegmt=True)
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{tag}"', "Last-Modified": modified, **_HEADERS}
        super().__init__(media_type=media_type, headers={**headers, "Content-Length": str(entry.nbytes)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, in chunks as they come from the store."""
        if scope["method"] == "HEAD":
            await super().__call__(scope, receive, send)
            return
        start, end = single_range(Headers(scope=scope).get("range", ""), self._entry.nbytes)
        headers = MutableHeaders(raw=list(self.raw_headers))
        headers["Content-Length"] = str(end - start)
        if part := end - start < self._entry.nbytes:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{self._entry.nbytes}"
        try:
            file = await asyncio.to_thread(self._store.open, self._entry.name)
        except ArtifactMissingError:
            raise artifact_expired(self._entry.name) from None
        response = StreamingResponse(_chunks(file, start, end), 206 if part else 200, headers)
        await response(scope, receive, send)


def _chunks(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    with file:
        file.seek(start)
        while start < end:
            chunk = file.read(min(_CHUNK_BYTES, end - start))
            if not chunk:  # the client sees that bytes are missing
                raise EOFError(f"the file ends {end - start} bytes too soon")
            start += len(chunk)
            yield chunk


def single_range(header: str, size: int) -> tuple[int, int]:
    """Return the bytes that are to be sent, the second being the end; all for no or several ranges.

    Args:
        header: A Range header of `wanted_ranges`.
        size: Of the file.
    """
    match = _RANGE.fullmatch(header.removeprefix("bytes="))
    if match is None:
        return 0, size
    if not match["first"]:
        return max(size - int(match["last"]), 0), size
    return int(match["first"]), min(int(match["last"] or size) + 1, size)


def precondition(headers: Headers, etag: str, modified: str) -> int | None:
    """Say what becomes of a GET or HEAD under its conditions.

    Args:
        headers: Of the request.
        etag: Of the file, strong, in quotes.
        modified: The Last-Modified of the file, a date of HTTP.

    Returns:
        412 (it is not what the client wants), 304 (the client has it), or None: send it.
    """
    if (wanted := headers.get("if-match")) is not None:
        if "*" not in _tags(wanted) and etag not in _tags(wanted):
            return 412
    elif (since := headers.get("if-unmodified-since")) is not None and _is_later(modified, since):
        return 412
    if (had := headers.get("if-none-match")) is not None:
        tags = {tag.removeprefix("W/") for tag in _tags(had)}
        return 304 if tags & {"*", etag} else None
    if (since := headers.get("if-modified-since")) is not None and _is_later(modified, since) is False:
        return 304
    return None


def wanted_ranges(headers: Headers, etag: str, modified: str, size: int) -> str | None:
    """Reduce the Range of a GET to what of it can be sent.

    Returns:
        A Range header of satisfiable ranges alone; "" where the whole file is to be sent, since nothing else was asked
        for or it is no range of bytes; None where no range that was asked for has a byte of the file (416).
    """
    unless = headers.get("if-range")
    match = _RANGES.fullmatch(headers.get("range", ""))
    if match is None or (unless is not None and unless not in (etag, modified)):
        return ""
    parts = [part.strip() for part in match["ranges"].split(",") if part.strip()]
    ranges = [_RANGE.fullmatch(part) for part in parts]
    if not ranges or not all(found and _is_range(found) for found in ranges):
        return ""
    satisfiable = [found[0] for found in ranges if found and _has_bytes(found, size)]
    return f"bytes={','.join(satisfiable)}" if satisfiable else None


def _is_range(found: re.Match[str]) -> bool:
    first, last = found["first"], found["last"]
    return bool(first or last) and not (first and last and int(last) < int(first))


def _has_bytes(found: re.Match[str], size: int) -> bool:
    return int(found["first"]) < size if found["first"] else int(found["last"]) > 0 and size > 0


def _tags(header: str) -> list[str]:
    return [tag.strip() for tag in header.split(",")]


def _is_later(modified: str, since: str) -> bool | None:
    """Whether a date is after another one; None where the other is none, which then says nothing."""
    try:
        return parsedate_to_datetime(modified) > parsedate_to_datetime(since)
    except (ValueError, TypeError):  # no date; or one without a zone, which cannot be compared
        return None
