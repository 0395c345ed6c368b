"""What every request for media may say, and how it becomes the pipeline's inputs."""

from __future__ import annotations

import re
from typing import Annotated, TypeAlias, TypeVar

import msgspec
from msgspec import Meta

from api.body import check_length
from api.errors import from_validation, invalid
from api.forms import Fields
from roles.messages.work import Input as PipelineInput
from roles.messages.work import Numbers, Pictures, Scalar

MAX_TEXT = 32_768
MAX_INPUTS = 64
MAX_SEED = 2**63 - 1

Text: TypeAlias = Annotated[str, Meta(max_length=MAX_TEXT)]
Input: TypeAlias = Text | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | float | bool | None
_SIZE = re.compile(r"(?P<width>[1-9][0-9]{0,4})x(?P<height>[1-9][0-9]{0,4})")


class MediaRequest(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's fields, then diffusers'; null is the same as not given.

    Any other field is taken for an input of the pipeline; the head refuses it if the pipeline has none of that name.
    """

    prompt: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)]
    size: str = "auto"
    """WIDTHxHEIGHT in pixels, or auto: the model's default."""
    model: str | None = None
    user: str | None = None
    """Taken for compatibility, and not kept."""
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    num_inference_steps: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    guidance_scale: float | None = None
    negative_prompt: Text | None = None


R = TypeVar("R", bound=MediaRequest)

_INPUTS = ("prompt", "num_inference_steps", "guidance_scale", "negative_prompt")


def own_fields(kind: type[MediaRequest]) -> frozenset[str]:
    """Names of the fields of a request that are typed; the others are inputs of the pipeline."""
    return frozenset(kind.__struct_fields__)


def parse(fields: Fields, kind: type[R]) -> tuple[R, dict[str, PipelineInput]]:
    """Check types and shapes, gather the pipeline's inputs; raises ApiError 413, 422 with the field at fault."""
    body, own = fields.values, kind.__struct_fields__
    given = {name: body[name] for name in own if body.get(name) is not None}
    try:
        wanted = msgspec.convert(given, kind, strict=not fields.texts)
    except msgspec.ValidationError as error:
        raise from_validation(error) from None
    inputs: dict[str, PipelineInput] = {name: value for name in _INPUTS if (value := getattr(wanted, name)) is not None}
    inputs |= {name: _extra(name, value) for name, value in body.items() if name not in own}
    if len(inputs) > MAX_INPUTS:
        raise invalid("prompt", f"more than {MAX_INPUTS} inputs")
    if inputs.get("mask_image") is not None and inputs.get("image") is None:
        raise invalid("image", "a mask needs the image that it is for")
    inputs |= parse_size(wanted.size, inputs)
    check_length(inputs)
    return wanted, inputs


def _extra(name: str, value: object) -> PipelineInput:
    if isinstance(value, Pictures | Numbers):
        return value
    try:
        converted: Scalar = msgspec.convert(value, Input)
    except msgspec.ValidationError as error:
        message = f"{error}: an input of the pipeline is a string, number, bool, picture, list of numbers or null"
        raise invalid(name, message) from None
    return converted


def parse_size(size: str, inputs: dict[str, PipelineInput]) -> dict[str, PipelineInput]:
    """Return height and width in pixels, nothing for auto."""
    if size == "auto":
        return {}
    match = _SIZE.fullmatch(size)
    if match is None:
        raise invalid("size", "size is WIDTHxHEIGHT in pixels, as in 1024x1024, or auto")
    if "height" in inputs or "width" in inputs:
        raise invalid("size", "give size, or height and width, not both")
    return {"height": int(match["height"]), "width": int(match["width"])}
