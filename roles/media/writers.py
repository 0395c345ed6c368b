"""Write media to the bytes of a file. The same media always give the same bytes: no time and no program's name."""

from __future__ import annotations

import importlib
import io
import wave
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Final, TypeAlias

import numpy as np
from PIL import Image
from safetensors.torch import save

from triptych.roles.media.decoded import Audio, Check, Latents, Media, MediaError, Stills, VideoFrames
from triptych.roles.media.formats import FORMATS, Content, can_hold, default_for
from triptych.roles.media.metadata import FileMetadata, image_settings


@dataclass(frozen=True, slots=True)
class WriteOptions:
    """How media are written."""

    format: str
    """One of `FORMATS`."""
    fps: float
    """Frames per second of a video."""
    check: Check
    """Called between two frames; what it raises ends the writing."""
    quality: int = 0
    """Of a lossy format, 1 to 100; 0 for 95."""
    metadata: FileMetadata | None = None
    """What the file says of itself; None for nothing."""


Write: TypeAlias = Callable[[Any, WriteOptions], bytes]
"""Writes media that the format can hold."""

_IMAGES: Final[Mapping[str, Mapping[str, object]]] = {
    # Every knob is fixed, so that one image always gives the same bytes.
    "png": {"format": "PNG", "compress_level": 6, "optimize": False},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0, "optimize": False},
    "webp": {"format": "WEBP", "quality": 95, "method": 4, "exact": True},
    "gif": {"format": "GIF", "optimize": False},
}
_PLAIN: Final[Mapping[str, tuple[str, ...]]] = {
    # The modes that are written as they are; one without "RGBA" has no transparency.
    "png": ("L", "LA", "RGB", "RGBA", "I;16"),
    "jpeg": ("L", "RGB"),
    "webp": ("RGB", "RGBA"),
    "gif": ("L", "RGB", "RGBA"),
}
_LONG_AGO: Final = (1980, 1, 1, 0, 0, 0)
_UNIX: Final = 3
_READABLE: Final = 0o644 << 16


def encode(
    media: Media,
    output_format: str,
    fps: float,
    check: Check = lambda: None,
    *,
    quality: int = 0,
    metadata: FileMetadata | None = None,
) -> bytes:
    """Write media to the bytes of a file.

    Args:
        media: Images, a video, sound or latents.
        output_format: One of `FORMATS`. A "png", "webp" or "gif" of a video moves, and is silent; a "gif" has
            256 colours in each frame. A "zip" has a PNG for each image or frame, in order by name, and `sound.wav`
            where there is sound.
        fps: Frames per second of a video.
        check: Called between two frames; what it raises ends the writing.
        quality: Of a lossy format, 1 to 100; 0 for 95.
        metadata: What the file says of itself; formats that have no place for it leave it out.

    Raises:
        MediaError: The format cannot hold such media, or is unknown.
    """
    if output_format not in FORMATS:
        raise MediaError(f"output format {output_format!r} is none of {', '.join(FORMATS)}")
    frames = len(media.frames) if isinstance(media, VideoFrames) else None
    if not can_hold(output_format, content_of(media), frames):
        raise MediaError(f"the decoder made {_describe(media)}, which a file of the format {output_format} cannot hold")
    module, _, name = FORMATS[output_format].writer.partition(":")
    write: Write = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return write(media, WriteOptions(output_format, fps, check, quality, metadata))


def content_of(media: Media) -> Content:
    """Name what media are, as the table of formats does."""
    match media:
        case Latents():
            return "latents"
        case Audio():
            return "audio"
        case VideoFrames():
            return "video"
        case Stills():
            return "image" if len(media.images) == 1 else "images"


def default_format(media: Media) -> str:
    """Choose the output format for media where the request names none; a single silent frame is an image."""
    if isinstance(media, VideoFrames) and len(media.frames) == 1 and media.sound is None:
        return default_for("image")
    return default_for(content_of(media))


def _describe(media: Media) -> str:
    match media:
        case Latents():
            return "latents"
        case Audio():
            return "sound"
        case VideoFrames():
            return f"a video of {len(media.frames)} frames"
        case Stills():
            return "one image" if len(media.images) == 1 else f"{len(media.images)} images"


def write_image(media: Stills | VideoFrames, options: WriteOptions) -> bytes:
    """Write an image, or a video as one that moves."""
    return _save(list(_images(media, options.check)), options)


def _images(media: Stills | VideoFrames, check: Check) -> Iterator[Image.Image]:
    for image in media.images if isinstance(media, Stills) else map(Image.fromarray, media.frames):
        check()
        yield image


def _save(images: Sequence[Image.Image], options: WriteOptions) -> bytes:
    output_format, fps = options.format, options.fps
    settings = {**_IMAGES[output_format], **image_settings(output_format, options.metadata)}
    if options.quality and FORMATS[output_format].lossy:
        settings["quality"] = options.quality
    if len(images) > 1:
        duration = _hundredths(len(images), fps) if output_format == "gif" else 1000 / fps
        settings |= {"save_all": True, "append_images": images[1:], "duration": duration, "loop": 0}
    image = images[0]
    plain = _PLAIN[output_format]
    if image.mode == "I;16" and image.mode not in plain:
        # Pillow would clip, not scale, what has 16 bits.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in plain:
        has_alpha = "RGBA" in plain and image.has_transparency_data
        image = image.convert("RGBA" if has_alpha else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, **settings)
    return buffer.getvalue()


def _hundredths(frames: int, fps: float) -> list[int]:
    """Milliseconds of each frame in the steps that GIF has, so that the whole is as long as it should be."""
    ends = [round(100 * number / fps) * 10 for number in range(frames + 1)]
    return [end - start for start, end in pairwise(ends)]


def write_zip(media: Stills | VideoFrames, options: WriteOptions) -> bytes:
    """Write an archive with a PNG for each image or frame, and the sound if there is any."""
    as_png = replace(options, format="png")
    buffer = io.BytesIO()
    # Stored, because a PNG does not get any smaller.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, image in enumerate(_images(media, options.check)):
            archive.writestr(_entry(f"{number:05}.png"), _save([image], as_png))
        if isinstance(media, VideoFrames) and media.sound is not None:
            archive.writestr(_entry("sound.wav"), write_wav(media.sound, options))
    return buffer.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _LONG_AGO)
    entry.create_system, entry.external_attr = _UNIX, _READABLE
    return entry


def write_wav(sound: Audio, _: WriteOptions) -> bytes:
    """Write sound as PCM of 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(sound.samples))
        file.setsampwidth(2)
        file.setframerate(sound.rate)
        file.writeframes(np.rint(sound.samples.T * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def write_latents(latents: Latents, _: WriteOptions) -> bytes:
    """Write a safetensors file."""
    data: bytes = save(dict(latents.tensors))
    return data
