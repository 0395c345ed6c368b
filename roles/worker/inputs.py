"""Turn the inputs of a message into those of a pipeline: load the files that they refer to, convert lists."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from PIL import Image, ImageOps

from triptych.engines.parameters.schema import MASKS, ParameterKind, Signature
from triptych.roles.media.uploads import UploadError, UploadStore, is_video
from triptych.roles.media.video_input import VideoInputError, VideoLimits, no_check, read_video
from triptych.roles.messages.common import Images, Json, Numbers, Options, Tensors, Upload, uploads_of

VIDEO_LIMITS: Final = VideoLimits(seconds=300)
"""Of a video that the API has decoded once; this machine may be slower, or busy."""


def has_files(inputs: Mapping[str, object]) -> bool:
    """Return whether an input refers to a file."""
    return bool(uploads_of(inputs))


def resolve_inputs(
    inputs: Mapping[str, object],
    store: UploadStore,
    signature: Signature,
    *,
    alpha: bool = False,
    check: Callable[[], None] = no_check,
) -> dict[str, object]:
    """Load the files that inputs of a request refer to. Files block on the disk: then call it off the event loop.

    Args:
        inputs: By name, as `roles.messages.common.Input`.
        store: Has the files.
        signature: Of the pipeline: says whether an input is one image or a list.
        alpha: Whether the model takes images with an alpha channel.
        check: Called for each file, and several times a second during a video; what it raises ends the loading.

    Returns:
        The inputs. Images are upright `PIL.Image.Image`, "L" for a mask, else "RGBA" with `alpha` or "RGB"; or
        lists of them, such as the frames of a video. Numbers are a list, or a tuple of integers for a pair. Options
        are a dict, and JSON is decoded. Each tensor of a file of tensors is a separate input, on the CPU, unchanged.

    Raises:
        UploadError: A file is missing or damaged, or there are several images where the pipeline takes one.
        OSError: The disk cannot be read.
    """
    resolved: dict[str, object] = {}
    for name, value in inputs.items():
        parameter = signature.parameter(name)
        kind = parameter.kind if parameter else ParameterKind.IMAGES
        match value:
            case Images():
                resolved[name] = _images(name, value, kind, store, alpha=alpha, check=check)
            case Numbers(values):
                resolved[name] = tuple(int(number) for number in values) if kind is ParameterKind.PAIR else list(values)
            case Options(options):
                resolved[name] = dict(options)
            case Tensors(file):
                check()
                resolved |= _tensors(file, store)
            case Json(text):
                resolved[name] = json.loads(text)
            case _:
                resolved[name] = value
    return resolved


def _images(
    name: str,
    value: Images,
    kind: ParameterKind,
    store: UploadStore,
    *,
    alpha: bool,
    check: Callable[[], None],
) -> Image.Image | list[Image.Image]:
    mask = name in MASKS
    opened = (image for file in value.files for image in _open(file, store, check))
    found = [as_mask(image) if mask else as_image(image, alpha=alpha) for image in opened]
    if kind is ParameterKind.IMAGE_LIST or len(found) > 1:
        if kind is ParameterKind.IMAGE:
            raise UploadError(f"{name} is one image, {len(found)} were given")
        return found
    if not found:
        raise UploadError(f"{name} is empty")
    return found[0]


def _open(file: Upload, store: UploadStore, check: Callable[[], None]) -> Iterator[Image.Image]:
    """Yield the image of a file, or the frames of a video."""
    check()
    if not is_video(file):
        yield store.open(file)
        return
    try:
        yield from read_video(store.read(file), VIDEO_LIMITS, check)
    except VideoInputError as error:
        raise UploadError(f"the upload {file.name} {error}") from error


def _tensors(file: Upload, store: UploadStore) -> dict[str, object]:
    # Imported here because most requests have no tensors.
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(store.read(file)))
    except (SafetensorError, KeyError, ValueError) as error:
        raise UploadError(f"the upload {file.name} cannot be read ({error})") from error


def as_image(image: Image.Image, *, alpha: bool = False) -> Image.Image:
    """Turn an image upright by its EXIF orientation, and convert it to "RGBA" with `alpha`, else to "RGB" on white."""
    upright = ImageOps.exif_transpose(image)
    if alpha or not upright.has_transparency_data:
        return upright.convert("RGBA" if alpha else "RGB")
    # Transparent pixels have arbitrary colours.
    clear = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def as_mask(image: Image.Image) -> Image.Image:
    """Convert an image to a mask, "L", white where to paint.

    That is what diffusers takes. OpenAI's API marks the area to paint by transparency instead, so a mask with
    transparent pixels is read that way.
    """
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        opaque = upright.convert("RGBA").getchannel("A")
        if opaque.getextrema()[0] != 255:
            return ImageOps.invert(opaque)
    return upright.convert("L")
