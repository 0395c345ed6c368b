"""GET /v1/images/{name}: finished files, under the names in responses. Conditions and ranges are RFC 9110's."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import formatdate, parsedate_to_datetime
from typing import BinaryIO, Final

from starlette.datastructures import Headers
from starlette.responses import Response, StreamingResponse
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
MAX_RANGES: Final = 100
"""Of one request; for more than that the whole file is sent."""
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
    """Make the response that is an artifact, parts of it, or 304; raises ApiError 404, 410, 412, 416, 503."""
    store = request.state["services"].artifacts
    try:
        entry = await asyncio.to_thread(store.stat, name)
    except ArtifactMissingError:
        raise artifact_expired(name) from None
    except ArtifactError:
        raise not_found(f"there is no file {name}") from None
    etag, modified = entry_etag(entry), formatdate(entry.modified_at, usegmt=True)
    headers = {**_HEADERS, "ETag": etag, "Last-Modified": modified}
    match precondition(request.headers, etag, modified):
        case 304:
            return Response(status_code=304, headers=headers)
        case 412:
            raise ApiError(
                412,
                "the file has changed: get it without If-Match and If-Unmodified-Since",
                code="changed",
            )
    ranges = wanted_ranges(request.headers, etag, modified, entry.nbytes) if request.method == "GET" else []
    if ranges is None:
        error = ApiError(416, f"the file has {entry.nbytes} bytes, and none of those asked for", code="no_such_range")
        error.headers["Content-Range"] = f"bytes */{entry.nbytes}"
        raise error
    media_type = FORMATS[name.rpartition(".")[2]].content_type
    return FileResponse(store, entry, media_type, {"Accept-Ranges": "bytes", **headers}, ranges)


def entry_etag(entry: Entry) -> str:
    """Return the ETag of a file."""
    return f'"{hashlib.md5(f"{entry.modified_at}-{entry.nbytes}".encode(), usedforsecurity=False).hexdigest()}"'


class FileResponse(Response):
    """An artifact, or ranges of it: one, or several as multipart/byteranges. Read from the store while it is sent.

    Args:
        store: Has the artifact.
        entry: What the store says of it.
        media_type: Its content type.
        headers: Of the answer.
        ranges: Which parts; none for all of it.
    """

    def __init__(
        self, store: ArtifactStore, entry: Entry, media_type: str, headers: Mapping[str, str], ranges: Sequence[Range]
    ) -> None:
        self._store = store
        self._entry = entry
        self._parts: list[bytes | Range] = [*(ranges or [Range(0, entry.nbytes)])]
        super().__init__(status_code=206 if ranges else 200, media_type=media_type, headers=dict(headers))
        if len(ranges) == 1:
            self.headers["Content-Range"] = ranges[0].content_range(entry.nbytes)
        elif ranges:
            boundary = secrets.token_hex(13)
            self._parts = byteranges(ranges, entry.nbytes, media_type, boundary)
            self.headers["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
        self.headers["Content-Length"] = str(sum(map(len, self._parts)))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, in chunks as they come from the store."""
        if scope["method"] == "HEAD":
            await super().__call__(scope, receive, send)
            return
        try:
            file = await asyncio.to_thread(self._store.open, self._entry.name)
        except ArtifactMissingError:
            raise artifact_expired(self._entry.name) from None
        response = StreamingResponse(_chunks(file, self._parts), self.status_code, self.headers)
        await response(scope, receive, send)


@dataclass(frozen=True, order=True, slots=True)
class Range:
    """Bytes of a file."""

    start: int
    end: int
    """The one after the last."""

    def __len__(self) -> int:
        return self.end - self.start

    def content_range(self, size: int) -> str:
        """Return the Content-Range of these bytes of a file of that size."""
        return f"bytes {self.start}-{self.end - 1}/{size}"


def byteranges(ranges: Sequence[Range], size: int, media_type: str, boundary: str) -> list[bytes | Range]:
    """Return the body of a multipart/byteranges: what stands between the ranges, and the ranges."""
    body: list[bytes | Range] = []
    for part in ranges:
        lines = (f"--{boundary}", f"Content-Type: {media_type}", f"Content-Range: {part.content_range(size)}", "", "")
        body += ["\r\n".join(lines).encode(), part, b"\r\n"]
    return [*body, f"--{boundary}--\r\n".encode()]


def _chunks(file: BinaryIO, parts: Iterable[bytes | Range]) -> Iterator[bytes]:
    with file:
        for part in parts:
            if isinstance(part, bytes):
                yield part
                continue
            file.seek(part.start)
            left = len(part)
            while left:
                chunk = file.read(min(_CHUNK_BYTES, left))
                if not chunk:  # the client sees that bytes are missing
                    raise EOFError(f"the file ends {left} bytes too soon")
                left -= len(chunk)
                yield chunk


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


def wanted_ranges(headers: Headers, etag: str, modified: str, size: int) -> list[Range] | None:
    """Return which bytes the Range of a GET asks for.

    Returns:
        Ranges that have bytes of the file, in order and without an overlap; none where the whole file is to be sent,
        since nothing else was asked for, it is no range of bytes, or there are too many; None where no range that was
        asked for has a byte of the file (416).
    """
    unless = headers.get("if-range")
    match = _RANGES.fullmatch(headers.get("range", ""))
    if match is None or (unless is not None and unless not in (etag, modified)):
        return []
    parts = [part.strip() for part in match["ranges"].split(",") if part.strip()]
    found = [_RANGE.fullmatch(part) for part in parts]
    if not 0 < len(found) <= MAX_RANGES or not all(each and _is_range(each) for each in found):
        return []
    ranges = sorted(_range(each, size) for each in found if each and _has_bytes(each, size))
    return _without_overlaps(ranges) or None


def _is_range(found: re.Match[str]) -> bool:
    first, last = found["first"], found["last"]
    return bool(first or last) and not (first and last and int(last) < int(first))


def _has_bytes(found: re.Match[str], size: int) -> bool:
    return int(found["first"]) < size if found["first"] else int(found["last"]) > 0 and size > 0


def _range(found: re.Match[str], size: int) -> Range:
    if not found["first"]:
        return Range(max(size - int(found["last"]), 0), size)
    return Range(int(found["first"]), min(int(found["last"] or size) + 1, size))


def _without_overlaps(ranges: Iterable[Range]) -> list[Range]:
    joined: list[Range] = []
    for each in ranges:
        if joined and each.start <= joined[-1].end:
            joined[-1] = Range(joined[-1].start, max(joined[-1].end, each.end))
        else:
            joined.append(each)
    return joined


def _tags(header: str) -> list[str]:
    return [tag.strip() for tag in header.split(",")]


def _is_later(modified: str, since: str) -> bool | None:
    """Whether a date is after another one; None where the other is none, which then says nothing."""
    try:
        return parsedate_to_datetime(modified) > parsedate_to_datetime(since)
    except (ValueError, TypeError, OverflowError):  # no date; one without a zone; one of a year that is none
        return None
