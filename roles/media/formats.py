"""The output formats. The writers, the API and its document, the client and the command derive from this table.

A new format is a row here and a writer. Imports nothing that could write one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple, TypeAlias

Content: TypeAlias = Literal["image", "images", "video", "audio", "latents"]
"""What a decoder makes for one job; "images" are several, such as layers."""


class Format(NamedTuple):
    """An output format."""

    name: str
    """What requests call it, and the ending of its files."""
    content_type: str
    holds: tuple[Content, ...]
    """What a file of it can hold. One that holds an image holds a video of one frame as well."""
    writer: str
    """`MODULE:FUNCTION` of this package, a `writers.Write`; imported when the first file is written."""
    default_for: tuple[Content, ...] = ()
    """What is written in it where a request names no format."""
    lossy: bool = False
    """Whether a request may set its quality."""
    other_endings: tuple[str, ...] = ()
    """Endings by which a client may name it too."""


LATENTS_FORMAT: Final = "safetensors"
"""The one that holds latents. Requests ask for it with `output_type`."""
FORMATS: Final[Mapping[str, Format]] = {
    row.name: row
    for row in (
        Format("png", "image/png", ("image", "video"), "writers:write_image", ("image",)),
        Format("jpeg", "image/jpeg", ("image",), "writers:write_image", lossy=True, other_endings=("jpg",)),
        Format("webp", "image/webp", ("image", "video"), "writers:write_image", lossy=True),
        Format("gif", "image/gif", ("image", "video"), "writers:write_image"),
        Format("mp4", "video/mp4", ("video",), "mp4:write_mp4", ("video",)),
        Format("zip", "application/zip", ("image", "images", "video"), "writers:write_zip", ("images",)),
        Format("wav", "audio/wav", ("audio",), "writers:write_wav", ("audio",)),
        Format(LATENTS_FORMAT, "application/octet-stream", ("latents",), "writers:write_latents", ("latents",)),
    )
}
"""By name."""
REQUESTED_FORMATS: Final = tuple(name for name in FORMATS if name != LATENTS_FORMAT)
"""Names that a request may give as `output_format`."""
FORMAT_OF_ENDING: Final[Mapping[str, str]] = {
    ending: name for name in REQUESTED_FORMATS for ending in (name, *FORMATS[name].other_endings)
}
"""Names by the ending of a file's name."""


def default_for(content: Content) -> str:
    """Return the format for what a decoder has made where the request names none."""
    return next(row.name for row in FORMATS.values() if content in row.default_for)


def can_hold(output_format: str, content: Content, frames: object = None) -> bool:
    """Whether a file can hold what a decoder makes.

    Args:
        output_format: One of `FORMATS`.
        content: What is made.
        frames: Of a video, where they are known: one alone is an image as well.
    """
    holds = FORMATS[output_format].holds
    return content in holds or (content == "video" and frames == 1 and "image" in holds)


def formats_for(content: Content, frames: object = None) -> tuple[str, ...]:
    """Name the formats that can hold `content`, its default first; `frames` as in `can_hold`."""
    holding = [name for name in FORMATS if can_hold(name, content, frames)]
    return tuple(sorted(holding, key=lambda name: content not in FORMATS[name].default_for))
