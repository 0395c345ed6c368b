"""Pictures at the edge: taken out of a body, checked by their content, put into the upload store."""

from __future__ import annotations

import asyncio
import binascii
import io
import re
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias

import structlog
from PIL import Image, UnidentifiedImageError
from starlette.datastructures import UploadFile

from api.errors import ApiError, invalid
from roles.messages.work import Pictures, Upload
from roles.uploads import ENDINGS, UploadsFull, UploadStore

log = structlog.stdlib.get_logger("api")

MAX_FILE_BYTES: Final = 32 << 20
MAX_PIXELS: Final = 64_000_000
MAX_PIXELS_TOGETHER: Final = 4 * MAX_PIXELS
"""Of all pictures of one input."""
MAX_FILES: Final = 16
MAX_FRAMES: Final = 256
"""Of an input that is a video."""
MAX_DECODING: Final = 4

Source: TypeAlias = str | UploadFile
"""A picture as it came: base64, plain or a data URL, or a file of a form."""

_DATA_URL: Final = re.compile(r"data:[^,]{0,255};base64,", re.IGNORECASE)
_REMOTE: Final = re.compile(r"(?:https?|ftp|file|s3|gs):", re.IGNORECASE)
_BASE64_CHUNK: Final = 1 << 20
_MAGIC: Final = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
_KEPT: Final = [name for name in ENDINGS if name != "MPO"]


class UploadDesk:
    """Takes pictures in."""

    def __init__(self, store: UploadStore) -> None:
        self.store = store
        # A picture of the largest size is 256 MB when it is decoded.
        self._decoding = asyncio.Semaphore(MAX_DECODING)

    async def keep(self, param: str, sources: Sequence[Source]) -> Pictures:
        """Check pictures and keep them.

        Raises ApiError that names `param`: 413 (too large), 415 (another format), 422 (no picture), 503 (no room).
        """
        files, left = [], MAX_PIXELS_TOGETHER
        for source in sources:
            file, pixels = await self._keep_one(param, source, left)
            files.append(file)
            left -= pixels
        return Pictures(tuple(files))

    async def _keep_one(self, param: str, source: Source, left: int) -> tuple[Upload, int]:
        if isinstance(source, str):
            data = await asyncio.to_thread(from_base64, source, param)
        elif source.size is not None and source.size > MAX_FILE_BYTES:
            raise _too_large(param)
        else:
            data = await source.read()
        async with self._decoding:
            return await asyncio.to_thread(self._check_and_save, data, param, left)

    def _check_and_save(self, data: bytes, param: str, left: int) -> tuple[Upload, int]:
        ending, pixels = check(data, param, left)
        try:
            return self.store.save(data, ending), pixels
        except UploadsFull as error:
            log.warning("an upload was refused", reason=str(error))
            message = "there is no room for more pictures now"
            raise ApiError(503, message, code="full", param=param, retry_after_s=60.0) from None
        except OSError as error:
            log.warning("an upload cannot be kept", error=str(error))
            message = "the picture cannot be kept on the server's disk"
            raise ApiError(503, message, code="unavailable", param=param, retry_after_s=5.0) from None


def from_base64(text: str, param: str) -> bytes:
    """Decode base64, plain or of a data URL; raises ApiError 413 or 422."""
    if _REMOTE.match(text):
        raise invalid(
            param, "nothing is fetched from a URL: send the picture's bytes, in base64 or as a file of a form"
        )
    prefix = _DATA_URL.match(text)
    start = prefix.end() if prefix else 0
    if len(text) - start > MAX_FILE_BYTES * 4 // 3 + 4:
        raise _too_large(param)
    try:
        return b"".join(_decoded(text[start:].encode("ascii")))
    except (binascii.Error, UnicodeEncodeError) as error:
        message = f"a picture is base64, plain or as data:image/png;base64,... ({error})"
        raise invalid(param, message) from None


def _decoded(encoded: bytes) -> Iterator[bytes]:
    # In pieces, because one call holds the interpreter, and with it the event loop.
    for at in range(0, len(encoded), _BASE64_CHUNK):
        piece = encoded[at : at + _BASE64_CHUNK]
        if b"=" in piece and at + _BASE64_CHUNK < len(encoded):
            raise binascii.Error("padding before the end")
        yield binascii.a2b_base64(piece, strict_mode=True)


def check(data: bytes, param: str, left: int = MAX_PIXELS_TOGETHER) -> tuple[str, int]:
    """Decode a picture to see that it can be.

    What it is shows in its bytes, whatever it is called. Its size is bounded before it is decoded.

    Args:
        data: Its bytes.
        param: What a refusal names.
        left: How many pixels the input may still have.

    Returns:
        The ending of its format, and how many pixels it has.

    Raises ApiError 413 (bytes or pixels), 415 (another format), 422 (damaged, or several pictures).
    """
    if not data:
        raise invalid(param, "the picture is empty")
    if len(data) > MAX_FILE_BYTES:
        raise _too_large(param)
    try:
        picture = Image.open(io.BytesIO(data), formats=_KEPT)
    except Image.DecompressionBombError:
        raise _too_many_pixels(param) from None
    except UnidentifiedImageError as error:
        if data.startswith(_MAGIC):
            raise _damaged(param, error) from error
        raise ApiError(415, "a picture is a PNG, JPEG or WebP", code="unsupported_media_type", param=param) from None
    except Exception as error:  # Pillow raises whatever its parsers run into
        raise _damaged(param, error) from error
    with picture:
        pixels = picture.width * picture.height
        if pixels > left:
            raise _too_many_together(param)
        return _check_opened(picture, param), pixels


def _check_opened(picture: Image.Image, param: str) -> str:
    if picture.width * picture.height > MAX_PIXELS:
        raise _too_many_pixels(param)
    ending = ENDINGS[str(picture.format)]
    try:
        # Cameras put a small copy, or a map of brightness, behind a JPEG; that is no second picture.
        frames = 1 if ending == "jpeg" else getattr(picture, "n_frames", 1)
        if frames == 1:
            picture.load()
    except Exception as error:  # as above
        raise _damaged(param, error) from error
    if frames != 1:
        raise invalid(param, f"the picture moves, it has {frames} frames: send one, or each on its own")
    return ending


def _damaged(param: str, error: Exception) -> ApiError:
    # Pillow's error has no more to say of what it could not even open.
    why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
    return invalid(param, f"the picture is damaged or not complete{why}")


def _too_large(param: str) -> ApiError:
    return ApiError(413, f"a picture is at most {MAX_FILE_BYTES} bytes", code="too_long", param=param)


def _too_many_together(param: str) -> ApiError:
    message = f"the pictures have more than {MAX_PIXELS_TOGETHER} pixels together"
    return ApiError(413, message, code="too_long", param=param)


def _too_many_pixels(param: str) -> ApiError:
    return ApiError(413, f"a picture has at most {MAX_PIXELS} pixels", code="too_long", param=param)
