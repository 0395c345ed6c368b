"""From the inputs of a message to what a pipeline takes: references become pictures, lists become lists."""

from __future__ import annotations

import json
from collections.abc import Mapping

from PIL import Image, ImageOps

from triptych.engines.parameters import MASKS, Kind, Signature
from triptych.roles.messages.work import Json, Numbers, Options, Pictures, Tensors, Upload
from triptych.roles.uploads import UploadError, UploadStore


def has_files(inputs: Mapping[str, object]) -> bool:
    """Whether there is anything to be read from the disk."""
    return any(isinstance(value, Pictures | Tensors) for value in inputs.values())


def resolve(
    inputs: Mapping[str, object], store: UploadStore, signature: Signature, *, alpha: bool = False
) -> dict[str, object]:
    """Read what the inputs of a request refer to. With files it blocks on the disk: call it off the event loop then.

    Args:
        inputs: By name, as `roles.messages.work.Input`.
        store: Where the files are.
        signature: Of the pipeline, which says whether an input is one picture or a list.
        alpha: Whether the model takes pictures with an alpha channel.

    Returns:
        The inputs. Pictures are upright `PIL.Image.Image`, "L" for a mask, else "RGBA" with `alpha` or "RGB"; or
        lists of them. Numbers are a list, or a tuple of whole numbers for a pair. Options are a dict, and JSON is what
        it says. Each tensor of a file of tensors is an input of its own, on the CPU, as it was sent.

    Raises:
        UploadError: A file is missing or damaged, or there are several pictures where the pipeline takes one.
        OSError: The disk cannot be read.
    """
    resolved: dict[str, object] = {}
    for name, value in inputs.items():
        parameter = signature.parameter(name)
        kind = parameter.kind if parameter else Kind.IMAGES
        match value:
            case Pictures():
                resolved[name] = _pictures(name, value, kind, store, alpha=alpha)
            case Numbers(values):
                resolved[name] = tuple(int(number) for number in values) if kind is Kind.PAIR else list(values)
            case Options(options):
                resolved[name] = dict(options)
            case Tensors(file):
                resolved |= _tensors(file, store)
            case Json(text):
                resolved[name] = json.loads(text)
            case _:
                resolved[name] = value
    return resolved


def _pictures(
    name: str, value: Pictures, kind: Kind, store: UploadStore, *, alpha: bool
) -> Image.Image | list[Image.Image]:
    mask = name in MASKS
    found = [as_mask(picture) if mask else as_picture(picture, alpha=alpha) for picture in map(store.open, value.files)]
    if kind is Kind.IMAGE_LIST or len(found) > 1:
        if kind is Kind.IMAGE:
            raise UploadError(f"{name} is one picture, {len(found)} were given")
        return found
    if not found:
        raise UploadError(f"{name} is empty")
    return found[0]


def _tensors(file: Upload, store: UploadStore) -> dict[str, object]:
    # Here, because most requests have none.
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return dict(load(store.read(file)))
    except (SafetensorError, KeyError, ValueError) as error:
        raise UploadError(f"the upload {file.name} cannot be read ({error})") from error


def as_picture(picture: Image.Image, *, alpha: bool = False) -> Image.Image:
    """Turn a picture upright by its EXIF orientation, and convert it to "RGBA" with `alpha`, else to "RGB" on white."""
    upright = ImageOps.exif_transpose(picture)
    if alpha or not upright.has_transparency_data:
        return upright.convert("RGBA" if alpha else "RGB")
    # Below what is transparent lies whatever a program left there.
    clear = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")


def as_mask(picture: Image.Image) -> Image.Image:
    """Convert a picture to a mask, "L", white where to paint.

    That is what diffusers takes. In OpenAI's API it is the transparent part of a mask that says where; so a mask with
    something transparent is read that way.
    """
    upright = ImageOps.exif_transpose(picture)
    if upright.has_transparency_data:
        opaque = upright.convert("RGBA").getchannel("A")
        if opaque.getextrema()[0] != 255:
            return ImageOps.invert(opaque)
    return upright.convert("L")
