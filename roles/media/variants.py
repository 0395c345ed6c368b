"""Images of a finished video: a thumbnail, and a sheet with frames of all of it. Read from its MP4 with PyAV."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, BinaryIO, Final

import av
from PIL import Image

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

THUMBNAIL_SIDE: Final = 512
TILE_SIDE: Final = 256
"""Longest side of a thumbnail and of a frame on the sheet, in pixels."""
COLUMNS: Final = 5
MOST_TILES: Final = 25


def make_thumbnail(video: BinaryIO) -> bytes:
    """Make a WebP of the first frame."""
    with av.open(video, "r", format="mp4") as container:
        frame = next(container.decode(video=0))
    return _encode(_small(frame, THUMBNAIL_SIDE), "WEBP")


def make_spritesheet(video: BinaryIO) -> bytes:
    """Make a JPEG of at most 25 frames at equal distances, five in a row, the earliest first; the rest is black."""
    with av.open(video, "r", format="mp4") as container:
        stream = container.streams.video[0]
        wanted = chosen_frames(stream.frames)
        tiles = [_small(frame, TILE_SIDE) for k, frame in enumerate(container.decode(stream)) if k in wanted]
    width, height = tiles[0].size
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (width * min(len(tiles), COLUMNS), height * rows))
    for k, tile in enumerate(tiles):
        sheet.paste(tile, (k % COLUMNS * width, k // COLUMNS * height))
    return _encode(sheet, "JPEG")


MAKERS: Final[Mapping[str, Callable[[BinaryIO], bytes]]] = {
    "thumbnail": make_thumbnail,
    "spritesheet": make_spritesheet,
}
"""By the name of the variant, as in `artifacts.VARIANTS`."""


def chosen_frames(count: int) -> frozenset[int]:
    """Return which of so many frames are on the sheet: all of a few, else the first, the last, and some between."""
    if count <= MOST_TILES:
        return frozenset(range(max(count, 1)))
    return frozenset(round(k * (count - 1) / (MOST_TILES - 1)) for k in range(MOST_TILES))


def _small(frame: VideoFrame, side: int) -> Image.Image:
    scale = min(1.0, side / max(frame.width, frame.height))
    width, height = (max(1, round(scale * length)) for length in (frame.width, frame.height))
    image: Image.Image = frame.to_image(width=width, height=height, interpolation="AREA", threads=1)  # type: ignore[no-untyped-call]
    return image


def _encode(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, quality=85)
    return buffer.getvalue()
