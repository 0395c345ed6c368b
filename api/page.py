"""GET / and /page/NAME: the page for people, plain files that use the API as any other client does."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Mapping
from email.utils import formatdate
from pathlib import Path
from typing import Final, NamedTuple

from starlette.responses import Response

from triptych.api.artifacts import precondition
from triptych.api.services import ApiRequest

FOLDER: Final = Path(__file__).parent / "page_files"
INDEX: Final = "index.html"
POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        # Files that need a key are fetched with it, and shown as blobs.
        "img-src 'self' blob: data:",
        "media-src 'self' blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""The Content-Security-Policy: nothing inline, nothing of another host, and no text that becomes markup."""
_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class Representation(NamedTuple):
    """A file of the page as it is sent, plain or compressed."""

    content: bytes
    headers: Mapping[str, str]


class PageFile(NamedTuple):
    """A file of the page."""

    plain: Representation
    gzip: Representation


def read_files(folder: Path = FOLDER) -> dict[str, PageFile]:
    """Read the files of the page; returns them by the path of their URL."""
    return {
        "/" if path.name == INDEX else f"/page/{path.name}": _read(path)
        for path in sorted(folder.iterdir())
        if path.suffix in _TYPES
    }


def _read(path: Path) -> PageFile:
    content = path.read_bytes()
    digest = hashlib.blake2s(content, digest_size=12).hexdigest()
    headers = {
        "Content-Type": _TYPES[path.suffix],
        "ETag": f'"{digest}"',
        "Vary": "Accept-Encoding",
        "Last-Modified": formatdate(path.stat().st_mtime, usegmt=True),
        # Browsers ask each time, and get 304 until the server is another version.
        "Cache-Control": "no-cache",
        "Content-Security-Policy": POLICY,
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
    }
    compressed = {**headers, "ETag": f'"{digest}-gzip"', "Content-Encoding": "gzip"}
    return PageFile(Representation(content, headers), Representation(gzip.compress(content, mtime=0), compressed))


FILES: Final = read_files()
"""The files of the page, by the path of their URL. They hold no secret and need no key; what they call does."""


async def get_page_file(request: ApiRequest) -> Response:
    """Return a file of the page."""
    file = FILES[request.scope["path"]]
    content, headers = file.gzip if "gzip" in request.headers.get("accept-encoding", "") else file.plain
    if precondition(request.headers, headers["ETag"], headers["Last-Modified"]) == 304:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers)
