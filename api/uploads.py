"""Images, videos and tensors of a request: checked by their content and put into the upload store."""

from __future__ import annotations

import asyncio
import binascii
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple, TypeAlias

import safetensors
import structlog
from msgspec.structs import replace
from PIL import ExifTags, Image, UnidentifiedImageError
from safetensors import SafetensorError
from starlette.datastructures import UploadFile

from triptych.api.errors import ApiError, field_error
from triptych.roles.media.files import is_disk_full
from triptych.roles.media.uploads import ENDINGS, TENSORS_ENDING, UploadsFullError, UploadStore
from triptych.roles.media.video_input import VideoInputError, VideoLimits, check_video, video_ending
from triptych.roles.messages.common import Images, Input, Tensors, Upload, uploads_of

log = structlog.stdlib.get_logger("api")

MAX_FILE_BYTES: Final = 32 << 20
MAX_PIXELS: Final = 64_000_000
MAX_TOTAL_PIXELS: Final = 4 * MAX_PIXELS
"""Of all images of one input."""
MAX_IMAGES: Final = 16
MAX_FRAMES: Final = 256
"""Of an input that is a video."""
VIDEO_LIMITS: Final = VideoLimits(frames=MAX_FRAMES, pixels=MAX_TOTAL_PIXELS)
MAX_CONCURRENT_DECODES: Final = 4

MAX_TENSORS_HEADER_BYTES: Final = 1 << 16
MAX_TENSORS: Final = 32
MAX_DIMENSIONS: Final = 8
MAX_NAME: Final = 128
DTYPES: Final = frozenset({"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"})

Source: TypeAlias = str | UploadFile
"""An image as it came: base64, plain or a data URL, or a file of a form."""

_DATA_URL: Final = re.compile(r"data:[^,]{0,255};base64,", re.IGNORECASE)
_REMOTE_URL: Final = re.compile(r"(?:https?|ftp|file|s3|gs):", re.IGNORECASE)
_BASE64_CHUNK: Final = 1 << 20
_MAGIC: Final = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF")
_VIDEO_ERRORS: Final = {
    "too_large": (413, "too_long"),
    "unsupported": (415, "unsupported_media_type"),
    "damaged": (422, "invalid_value"),
}
"""Status and code of an error of `roles.media.video_input`."""
_FORMATS: Final = [name for name in ENDINGS if name != "MPO"]


class ImageSize(NamedTuple):
    """Of an image, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class UploadService:
    """Checks files that clients send, and keeps them."""

    def __init__(self, store: UploadStore) -> None:
        self.store = store
        # An image of the largest size is 256 MB when it is decoded.
        self._decoding = asyncio.Semaphore(MAX_CONCURRENT_DECODES)

    async def save(self, param: str, sources: Sequence[Source], *, video: bool = False) -> tuple[Images, ImageSize]:
        """Check images, or a video where the input takes one, and keep them; returns the size of the first as well.

        Raises ApiError that names `param`: 413 (too large), 415 (another format), 422 (no image), 503 (no room).
        """
        files, sizes, left = [], [], MAX_TOTAL_PIXELS
        for source in sources:
            data = await _read(param, source)
            ending = video_ending(data) if video else ""
            if ending and len(sources) > 1:
                raise field_error(param, f"must be one video, or images, and {len(sources)} files were given")
            async with self._decoding:
                if ending:
                    file, size = await asyncio.to_thread(self._check_and_save_video, data, param, ending)
                else:
                    file, size = await asyncio.to_thread(self._check_and_save, data, param, left, video=video)
            files.append(file)
            sizes.append(size)
            left -= size.width * size.height
        return Images(tuple(files)), sizes[0]

    async def save_tensors(self, param: str, source: Source) -> Tensors:
        """Check a safetensors file and keep it.

        Raises ApiError that names `param`: 413 (too large), 422 (no such file), 503 (no room).
        """
        data = await _read(param, source)
        if len(data) > MAX_FILE_BYTES:
            raise _too_large(param)
        async with self._decoding:
            names = await asyncio.to_thread(check_safetensors, data, param)
            return Tensors(await asyncio.to_thread(self._save, data, param, TENSORS_ENDING), names)

    async def renew(self, inputs: Mapping[str, Input]) -> None:
        """Keep the files of earlier inputs for a new request that has them, too.

        Raises ApiError that names the input: 410 (a file is not kept any more), 503 (no room).
        """
        for name, value in inputs.items():
            for upload in uploads_of({name: value}):
                async with self._decoding:
                    if not await asyncio.to_thread(self._renew, name, upload):
                        predicate = "is not kept any more: send it again, in a request of its own"
                        raise field_error(name, predicate, status=410, code="upload_expired")

    def _renew(self, param: str, upload: Upload) -> bool:
        with storing(param):
            return self.store.renew(upload)

    def _check_and_save(self, data: bytes, param: str, left: int, *, video: bool) -> tuple[Upload, ImageSize]:
        ending, size = check_image(data, param, left, video=video)
        return replace(self._save(data, param, ending), pixels=size.width * size.height), size

    def _check_and_save_video(self, data: bytes, param: str, ending: str) -> tuple[Upload, ImageSize]:
        if len(data) > MAX_FILE_BYTES:
            raise _too_large(param)
        try:
            info = check_video(data, VIDEO_LIMITS)
        except VideoInputError as error:
            status, code = _VIDEO_ERRORS[error.code]
            raise field_error(param, str(error), status=status, code=code) from None
        pixels = info.frames * info.width * info.height
        return replace(self._save(data, param, ending), pixels=pixels), ImageSize(info.width, info.height)

    def _save(self, data: bytes, param: str, ending: str) -> Upload:
        with storing(param):
            return self.store.save(data, ending)


@contextmanager
def storing(param: str) -> Iterator[None]:
    """Turn what a store raises that has no room for a file into ApiError 503, which names `param`."""
    try:
        yield
    except UploadsFullError as error:
        log.warning("an upload was refused", reason=str(error))
        predicate = "cannot be kept, the server has no room for more files: retry later"
        raise field_error(param, predicate, status=503, code="full", retry_s=60.0) from None
    except OSError as error:
        log.warning("a file cannot be kept", param=param, error=str(error))
        if is_disk_full(error):
            predicate, code, retry_s = "cannot be kept, the server's disk is full: retry later", "disk_full", 60.0
        else:
            predicate, code, retry_s = "cannot be kept on the server's disk: retry later", "unavailable", 5.0
        raise field_error(param, predicate, status=503, code=code, retry_s=retry_s) from None


async def _read(param: str, source: Source) -> bytes:
    if isinstance(source, str):
        return await asyncio.to_thread(decode_base64, source, param)
    if source.size is not None and source.size > MAX_FILE_BYTES:
        raise _too_large(param)
    return await source.read()


def decode_base64(text: str, param: str) -> bytes:
    """Decode base64, plain or of a data URL; raises ApiError 413 or 422."""
    if _REMOTE_URL.match(text):
        predicate = "is a URL, and nothing is fetched: send the image's bytes, in base64 or as a file of a form"
        raise field_error(param, predicate)
    prefix = _DATA_URL.match(text)
    start = prefix.end() if prefix else 0
    if len(text) - start > MAX_FILE_BYTES * 4 // 3 + 4:
        raise _too_large(param)
    try:
        # MIME breaks base64 into lines.
        return b"".join(_decode_chunks(text[start:].encode("ascii").translate(None, b"\r\n\t ")))
    except (binascii.Error, UnicodeEncodeError) as error:
        raise field_error(param, f"must be base64, plain or as data:image/png;base64,... ({error})") from None


def _decode_chunks(encoded: bytes) -> Iterator[bytes]:
    # In pieces, because one call would hold the interpreter, and with it the event loop.
    for at in range(0, len(encoded), _BASE64_CHUNK):
        piece = encoded[at : at + _BASE64_CHUNK]
        if b"=" in piece and at + _BASE64_CHUNK < len(encoded):
            raise binascii.Error("padding before the end")
        yield binascii.a2b_base64(piece, strict_mode=True)


def check_image(data: bytes, param: str, left: int = MAX_TOTAL_PIXELS, *, video: bool = False) -> tuple[str, ImageSize]:
    """Decode an image to see that it can be.

    What it is shows in its bytes, whatever it is called. Its size is bounded before it is decoded.

    Args:
        data: Its bytes.
        param: What a refusal names.
        left: How many pixels the input may still have.
        video: Whether it might as well have been a video.

    Returns:
        The ending of its format, and the size of the upright image.

    Raises ApiError 413 (bytes or pixels), 415 (another format), 422 (damaged, or several images).
    """
    if not data:
        raise field_error(param, "is an empty file")
    if len(data) > MAX_FILE_BYTES:
        raise _too_large(param)
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise _too_many_pixels(param) from None
    except UnidentifiedImageError as error:
        if data.startswith(_MAGIC):
            raise _damaged(param, error) from error
        predicate = f"must be an image, a PNG, JPEG or WebP{', or a video, an MP4 or WebM' if video else ''}"
        raise field_error(param, predicate, status=415, code="unsupported_media_type") from None
    except Exception as error:  # Pillow raises whatever its parsers run into
        raise _damaged(param, error) from error
    with image:
        if image.width * image.height > left:
            raise _too_many_total_pixels(param)
        return _check_open_image(image, param)


def _check_open_image(image: Image.Image, param: str) -> tuple[str, ImageSize]:
    if image.width * image.height > MAX_PIXELS:
        raise _too_many_pixels(param)
    ending = ENDINGS[str(image.format)]
    try:
        # Cameras put a small copy, or a map of brightness, behind a JPEG; that is no second image.
        frames = 1 if ending == "jpeg" else getattr(image, "n_frames", 1)
        if frames == 1:
            image.load()
        size = _upright_size(image)
    except Exception as error:  # as above
        raise _damaged(param, error) from error
    if frames != 1:
        raise field_error(param, f"must be an image that stands still, not {frames} frames: send each on its own")
    return ending, size


def _upright_size(image: Image.Image) -> ImageSize:
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return ImageSize(image.height, image.width) if turned else ImageSize(image.width, image.height)


def _damaged(param: str, error: Exception) -> ApiError:
    # Pillow's error has no more to say of what it could not even open.
    why = "" if isinstance(error, UnidentifiedImageError) else f" ({error})"
    return field_error(param, f"is damaged or not complete{why}: send the whole file")


def _too_large(param: str) -> ApiError:
    return field_error(param, f"must be at most {MAX_FILE_BYTES} bytes", status=413, code="too_long")


def _too_many_total_pixels(param: str) -> ApiError:
    predicate = f"must have at most {MAX_TOTAL_PIXELS} pixels together"
    return field_error(param, predicate, status=413, code="too_long")


def _too_many_pixels(param: str) -> ApiError:
    return field_error(param, f"must have at most {MAX_PIXELS} pixels", status=413, code="too_long")


def check_safetensors(data: bytes, param: str) -> tuple[str, ...]:
    """Check a safetensors file; returns the names of its tensors, in order.

    Args:
        data: Its bytes.
        param: What a refusal names.

    Raises ApiError 422: it is no such file, its offsets do not cover its bytes, or there is a tensor of another dtype,
    without elements or of too many dimensions.
    """
    # Its first 8 bytes say how long the header is, which is JSON; the library's own bound is far higher.
    if len(data) < 8 or int.from_bytes(data[:8], "little") > MAX_TENSORS_HEADER_BYTES:
        predicate = f"must be a safetensors file, with a header of at most {MAX_TENSORS_HEADER_BYTES} bytes"
        raise field_error(param, predicate)
    try:
        found = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise field_error(param, f"must be a safetensors file ({error})") from None
    if not 0 < len(found) <= MAX_TENSORS:
        raise field_error(param, f"must have 1 to {MAX_TENSORS} tensors, not {len(found)}")
    for name, tensor in found:
        shape, dtype = tensor["shape"], tensor["dtype"]
        if not 0 < len(name) <= MAX_NAME:
            raise field_error(param, f"has a tensor whose name is not 1 to {MAX_NAME} characters long")
        if dtype not in DTYPES:
            raise field_error(param, f"has {name} of dtype {dtype}, which must be one of {', '.join(sorted(DTYPES))}")
        if not 0 < len(shape) <= MAX_DIMENSIONS or 0 in shape:
            wanted = f"1 to {MAX_DIMENSIONS} sizes above 0"
            raise field_error(param, f"has {name} of shape {list(shape)}, which must be {wanted}")
    return tuple(sorted(name for name, _ in found))
