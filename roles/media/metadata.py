"""Say in a file what it is made from, where other programs look for it.

Most of them read AUTOMATIC1111's text: the prompt, the negative prompt, and a line of `Name: value`. It is where that
program puts it: the chunk `parameters` of a PNG, the EXIF UserComment of a JPEG or WebP, the comment of a GIF or
MP4. The request as JSON is in the chunk `triptych` of a PNG, and in the description of an MP4. The same provenance
gives the same bytes: no time, no version.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Collection, Mapping
from typing import Any, Final, NamedTuple

from PIL import ExifTags, TiffTags
from PIL.PngImagePlugin import PngInfo

from triptych.engines.parameters.aliases import GUIDANCE_SCALE
from triptych.engines.parameters.schema import Parameter
from triptych.engines.parameters.serving_config import STEPS
from triptych.roles.media.decoded import Media, Stills, VideoFrames
from triptych.roles.messages.common import Images, Input, Provenance, Tensors, plain_value

_SHOWN_DEFAULTS: Final[tuple[str, ...]] = (STEPS, GUIDANCE_SCALE)
"""Parameters that are written even where the pipeline's own default was taken."""
_FIRST: Final[Mapping[str, str]] = {STEPS: "Steps", "scheduler": "Sampler", GUIDANCE_SCALE: "CFG scale"}
_NAMES: Final[Mapping[str, str]] = {**_FIRST, "strength": "Denoising strength"}
"""AUTOMATIC1111's names of parameters; others have their own."""
_SIDES: Final = ("height", "width")
_MAX_TITLE: Final = 200
"""Characters; the comment has all of the prompt."""
_MAX_JPEG_EXIF: Final = 65_533
"""Bytes that fit into one segment of a JPEG."""
_DIRECTORY: Final = ">HHHLLL"
"""Of TIFF, with one entry: 1, tag, type, count, place, no further directory."""


class FileMetadata(NamedTuple):
    """What a file says of itself."""

    text: str
    """As AUTOMATIC1111 writes it."""
    request: str
    """A JSON object in ASCII: the body of a request that makes this file, with images by the digests of their bytes."""


def file_metadata(provenance: Provenance, media: Media, parameters: Collection[Parameter] = ()) -> FileMetadata:
    """Return what the file of `media` says of itself.

    Args:
        provenance: What it is made from.
        media: What is in it.
        parameters: Those of the pipeline: they have the defaults of what the request left out.
    """
    taken = {parameter.name: parameter for parameter in parameters}
    given = {taken[name].alias_of or name if name in taken else name for name in provenance.inputs}
    defaults = {name: taken[name].default for name in _SHOWN_DEFAULTS if name in taken and name not in given}
    values: dict[str, object] = {name: value for name, value in defaults.items() if value is not None}
    values |= {name: _plain(value) for name, value in provenance.inputs.items()}
    request = {**values, "model": provenance.model, "seed": provenance.seed}
    return FileMetadata(
        _text(values, provenance, _size(media)).replace("\0", ""),
        json.dumps(request, sort_keys=True),
    )


def _plain(value: Input) -> object:
    """Return an input as JSON has it."""
    match value:
        case Images(files):
            names = [file.name for file in files]
            return names[0] if len(names) == 1 else names
        case Tensors(file):
            return file.name
        case _:
            return plain_value(value)


def _size(media: Media) -> str:
    """Return WIDTHxHEIGHT; "" of what has none."""
    match media:
        case Stills(images):
            width, height = images[0].size
        case VideoFrames(frames):
            _, height, width, _ = frames.shape
        case _:
            return ""
    return f"{width}x{height}"


def _text(values: Mapping[str, object], provenance: Provenance, size: str) -> str:
    prompts = ("prompt", "negative_prompt")
    prompt, negative = (_shown(values.get(name)) for name in prompts)
    first = {_FIRST[name]: values[name] for name in _FIRST if name in values}
    rest = sorted(values.keys() - {*_FIRST, *_SIDES, *prompts})
    settings = {
        **first,
        "Seed": provenance.seed,
        "Size": size,
        "Model": provenance.model,
        **{_NAMES.get(name, name): values[name] for name in rest},
    }
    shown = {name: _shown(value) for name, value in settings.items()}
    last = ", ".join(f"{name}: {_quoted(value)}" for name, value in shown.items() if value)
    return "\n".join(filter(None, (prompt, negative and f"Negative prompt: {negative}", last)))


def _shown(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def _quoted(value: str) -> str:
    """Quote a value that readers could not tell from what comes after it, as AUTOMATIC1111 does."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value


def image_settings(output_format: str, metadata: FileMetadata | None) -> dict[str, Any]:
    """Return the settings with which Pillow writes metadata into an image.

    A JPEG that they do not fit into, with a prompt of some 30,000 characters, has none.
    """
    if metadata is None:
        return {}
    match output_format:
        case "png":
            chunks = PngInfo()
            chunks.add_text("parameters", metadata.text)
            chunks.add_text("triptych", metadata.request)
            return {"pnginfo": chunks}
        case "gif":
            return {"comment": metadata.text.encode()}
        case "jpeg" | "webp":
            written = _exif(metadata.text)
            return {} if output_format == "jpeg" and len(written) > _MAX_JPEG_EXIF else {"exif": written}
        case _:
            return {}


def mp4_tags(metadata: FileMetadata) -> dict[str, str]:
    """Return the tags of an MP4: the prompt as its title, the text as its comment, the JSON as its description."""
    prompt = json.loads(metadata.request).get("prompt")
    title = {"title": prompt.replace("\0", "")[:_MAX_TITLE]} if isinstance(prompt, str) else {}
    return {**title, "comment": metadata.text, "description": metadata.request}


def _exif(text: str) -> bytes:
    """Write EXIF with a UserComment alone; Pillow would give it the type of a list of bytes."""
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    # A header, a directory with the place of the EXIF directory, that one with the place of the comment: 8 + 18 + 18.
    directories = (
        struct.pack(_DIRECTORY, 1, ExifTags.IFD.Exif, TiffTags.LONG, 1, 26, 0),
        struct.pack(_DIRECTORY, 1, ExifTags.Base.UserComment, TiffTags.UNDEFINED, len(comment), 44, 0),
    )
    return b"".join((b"Exif\0\0", struct.pack(">2sHL", b"MM", 42, 8), *directories, comment))
