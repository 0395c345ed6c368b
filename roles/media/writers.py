"""From media to the bytes of a file: the same media always give the same bytes, with no time and no program's name."""

from __future__ import annotations

import io
import wave
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
from PIL import Image
from safetensors.torch import save

from triptych.roles.media.decoded import Audio, Check, Latents, Media, MediaError, Stills, VideoFrames
from triptych.roles.media.formats import CONTENT_TYPES, LATENTS_FORMAT

Write: TypeAlias = Callable[[Media, float, Check], bytes | None]
"""Media, frames per second, check; None where the format cannot hold such media."""

_IMAGES: Final[Mapping[str, Mapping[str, object]]] = {
    # Every knob is fixed, so that one image always gives the same bytes.
    "png": {"format": "PNG", "compress_level": 6, "optimize": False},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0, "optimize": False},
    "webp": {"format": "WEBP", "quality": 95, "method": 4, "exact": True},
    "gif": {"format": "GIF", "optimize": False},
}
_PLAIN: Final = {
    "png": ("L", "LA", "RGB", "RGBA", "I;16"),
    "jpeg": ("L", "RGB"),
    "webp": ("RGB", "RGBA"),
    "gif": ("L", "RGB", "RGBA"),
}
_LOSSY: Final = ("jpeg", "webp")
_LONG_AGO: Final = (1980, 1, 1, 0, 0, 0)
_UNIX: Final = 3
_READABLE: Final = 0o644 << 16


def encode(media: Media, output_format: str, fps: float, check: Check = lambda: None, *, quality: int = 0) -> bytes:
    """Write media down.

    Args:
        media: Images, a video, sound or latents.
        output_format: One of `CONTENT_TYPES`. A "png", "webp" or "gif" of a video moves, and is silent; a "gif" has
            256 colours in each frame. A "zip" has a PNG for each image or frame, in order by name, and `sound.wav`
            where there is sound.
        fps: Frames per second of a video.
        check: Called between two frames; what it raises ends the writing.
        quality: Of "jpeg" and "webp", 1 to 100; 0 for 95.

    Raises:
        MediaError: The format cannot hold such media, or is unknown.
    """
    if output_format not in CONTENT_TYPES:
        raise MediaError(f"output format {output_format!r} is none of {', '.join(CONTENT_TYPES)}")
    write = _image(output_format, quality) if output_format in _LOSSY else _WRITERS[output_format]
    data = write(media, fps, check)
    if data is None:
        raise MediaError(f"the decoder made {_what(media)}, which a file of the format {output_format} cannot hold")
    return data


def default_format(media: Media) -> str:
    """Choose the output format for media where the request names none; a single silent frame is an image."""
    if isinstance(media, Latents):
        return LATENTS_FORMAT
    if isinstance(media, Audio):
        return "wav"
    if isinstance(media, VideoFrames):
        return "png" if len(media.frames) == 1 and media.sound is None else "mp4"
    return "png" if len(media.images) == 1 else "zip"


def _what(media: Media) -> str:
    if isinstance(media, Latents):
        return "latents"
    if isinstance(media, Audio):
        return "sound"
    if isinstance(media, VideoFrames):
        return f"a video of {len(media.frames)} frames"
    return "one image" if len(media.images) == 1 else f"{len(media.images)} images"


def _image(output_format: str, quality: int = 0) -> Write:
    options = {**_IMAGES[output_format], **({"quality": quality} if quality else {})}

    def write(media: Media, fps: float, check: Check) -> bytes | None:
        if isinstance(media, Audio | Latents):
            return None
        images = list(_each(media, check))
        if len(images) > 1 and (isinstance(media, Stills) or output_format == "jpeg"):
            return None
        return _save(images, output_format, fps, options)

    return write


def _each(media: Stills | VideoFrames, check: Check) -> Iterator[Image.Image]:
    for image in media.images if isinstance(media, Stills) else map(Image.fromarray, media.frames):
        check()
        yield image


def _save(
    images: Sequence[Image.Image], output_format: str, fps: float, options: Mapping[str, object] | None = None
) -> bytes:
    options = dict(options or _IMAGES[output_format])
    if len(images) > 1:
        duration = _hundredths(len(images), fps) if output_format == "gif" else 1000 / fps
        options |= {"save_all": True, "append_images": images[1:], "duration": duration, "loop": 0}
    image = images[0]
    if image.mode == "I;16" and output_format != "png":
        # Pillow would clip, not scale, what has 16 bits.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in _PLAIN[output_format]:
        has_alpha = output_format != "jpeg" and image.has_transparency_data
        image = image.convert("RGBA" if has_alpha else "RGB")
    buffer = io.BytesIO()
    image.save(buffer, **options)  # type: ignore[arg-type]  # a table of keyword arguments
    return buffer.getvalue()


def _hundredths(frames: int, fps: float) -> list[int]:
    """Milliseconds of each frame in the steps that GIF has, so that the whole is as long as it should be."""
    ends = [round(100 * number / fps) * 10 for number in range(frames + 1)]
    return [end - start for start, end in pairwise(ends)]


def _zip(media: Media, fps: float, check: Check) -> bytes | None:
    if isinstance(media, Audio | Latents):
        return None
    buffer = io.BytesIO()
    # Stored, because a PNG does not get any smaller.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for number, image in enumerate(_each(media, check)):
            archive.writestr(_entry(f"{number:05}.png"), _save([image], "png", fps))
        if isinstance(media, VideoFrames) and media.sound is not None:
            archive.writestr(_entry("sound.wav"), wav(media.sound))
    return buffer.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _LONG_AGO)
    entry.create_system, entry.external_attr = _UNIX, _READABLE
    return entry


def _mp4(media: Media, fps: float, check: Check) -> bytes | None:
    if not isinstance(media, VideoFrames):
        return None
    # Here, because FFmpeg is large, and most processes of a cluster write no video.
    from triptych.roles.media.mp4 import mp4

    return mp4(media, fps, check)


def wav(sound: Audio) -> bytes:
    """Write sound as PCM of 16 bits."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(sound.samples))
        file.setsampwidth(2)
        file.setframerate(sound.rate)
        file.writeframes(np.rint(sound.samples.T * 32767).astype("<i2").tobytes())
    return buffer.getvalue()


def _latents(media: Media, fps: float, check: Check) -> bytes | None:
    return save(dict(media.tensors)) if isinstance(media, Latents) else None


_WRITERS: Final[Mapping[str, Write]] = {
    **{name: _image(name) for name in _IMAGES},
    "mp4": _mp4,
    "zip": _zip,
    LATENTS_FORMAT: _latents,
    "wav": lambda media, fps, check: wav(media) if isinstance(media, Audio) else None,
}
