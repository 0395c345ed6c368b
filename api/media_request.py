"""What every request for media may say, and how it becomes the pipeline's inputs."""

from __future__ import annotations

import re
from typing import Annotated, Final, NamedTuple, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, inspect

from triptych.api.body import check_length
from triptych.api.body_fields import Fields
from triptych.api.errors import ApiError, field_error
from triptych.api.field_names import FieldNames
from triptych.roles.messages.common import MAX_SEED, Images, Json, Numbers, Options, Scalar, Tensors
from triptych.roles.messages.common import Input as PipelineInput

MAX_TEXT = 32_768
MAX_INPUTS = 64
MAX_SEEDS = 10

Text: TypeAlias = Annotated[str, Meta(max_length=MAX_TEXT)]
Input: TypeAlias = Text | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | float | bool | None
Seed: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_SEED)]
Seeds: TypeAlias = Annotated[tuple[Seed, ...], Meta(min_length=1, max_length=MAX_SEEDS)]
_SIZE = re.compile(r"(?P<width>[1-9][0-9]{0,4})x(?P<height>[1-9][0-9]{0,4})")
_FIELD = re.compile(r" - at `\$\.(?P<name>\w+)")
_MISSING = re.compile(r"missing required field `(?P<name>[^`]+)`")


class NoEffectField(NamedTuple):
    """A field of OpenAI's that has no effect here: the values that ask for none, and what to do about the others."""

    values: tuple[str, ...]
    advice: str


_STREAM: Final = "nothing is streamed yet; send Prefer: respond-async, and ask GET /v1/requests/ID how far it is"
NO_EFFECT_FIELDS: Final = {
    "background": NoEffectField(("auto", "opaque"), "images have no transparent background"),
    "input_fidelity": NoEffectField(("low",), "strength says how much of an image is kept, where a model has it"),
    "moderation": NoEffectField(("auto", "low"), "nothing is moderated here"),
    "partial_images": NoEffectField(("0",), _STREAM),
    "quality": NoEffectField(("auto", "standard"), "num_inference_steps says how much work is put into an image"),
    "stream": NoEffectField(("false", "0"), _STREAM),
    "style": NoEffectField(("natural", "vivid"), "the prompt says in which style"),
}
"""By name; a parameter of the model goes before a field of the same name."""


class MediaRequest(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's fields, then diffusers'; null is the same as not given.

    Any other field is taken for an input of the pipeline; the head refuses it if the pipeline has none of that name.
    """

    prompt: Text | None = None
    """Left out where a model takes none; the head knows."""
    size: str = "auto"
    """WIDTHxHEIGHT in pixels, or auto: the model's default."""
    model: Annotated[str, Meta(max_length=128)] | None = None
    """The first where none is named."""
    user: str | None = None
    """Taken for compatibility, and not kept."""
    seed: Seed | Seeds | None = None
    """Of the first image, the next has the next; or a list with one for each."""
    num_inference_steps: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    guidance_scale: float | None = None
    negative_prompt: Text | None = None


R = TypeVar("R", bound=MediaRequest)

_INPUTS = ("prompt", "num_inference_steps", "guidance_scale", "negative_prompt")


def typed_fields(kind: type[MediaRequest]) -> frozenset[str]:
    """Names of the fields of a request that are typed; the others are inputs of the pipeline."""
    return frozenset(kind.__struct_fields__)


def parse_media_request(fields: Fields, kind: type[R]) -> tuple[R, dict[str, PipelineInput]]:
    """Check types and shapes, gather the pipeline's inputs; raises ApiError 413, 422 with the field at fault."""
    body, own, names = fields.values, kind.__struct_fields__, fields.names
    given = {name: body[name] for name in own if body.get(name) is not None}
    if fields.from_form and isinstance(seeds := given.get("seed"), str) and "," in seeds:
        given["seed"] = [seed.strip() for seed in seeds.strip("[] ").split(",")]
    try:
        wanted = msgspec.convert(given, kind, strict=not fields.from_form)
    except msgspec.ValidationError as error:
        raise validation_error(error, kind) from None
    inputs: dict[str, PipelineInput] = {name: value for name in _INPUTS if (value := getattr(wanted, name)) is not None}
    for name, value in body.items():
        if name in NO_EFFECT_FIELDS and name not in fields.model_inputs:
            check_no_effect(names.field(name), value, NO_EFFECT_FIELDS[name])
        elif name not in own:
            inputs[name] = _extra(names.field(name), value)
    if len(inputs) > MAX_INPUTS:
        raise ApiError(422, f"the request has more than {MAX_INPUTS} inputs", code="invalid_value")
    if inputs.get("mask_image") is not None and inputs.get("image") is None:
        raise names.invalid("image", "is required: a mask needs the image that it is for")
    inputs |= parse_size(wanted.size, inputs, names)
    check_length(inputs)
    return wanted, inputs


def validation_error(error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> ApiError:
    """Make a 422 that says what the field that msgspec points at should be."""
    if missing := _MISSING.search(str(error)):
        return field_error(missing["name"], "is required")
    at = _FIELD.search(str(error))
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    if at is None or at["name"] not in types:
        raise error
    return field_error(at["name"], f"must be {describe_type(inspect.type_info(types[at['name']]))}")


def describe_type(kind: inspect.Type) -> str:
    """Describe the values of a type, such as "a whole number from 1 to 10"."""
    match kind:
        case inspect.UnionType(types):
            return " or ".join(describe_type(one) for one in types if not isinstance(one, inspect.NoneType))
        case inspect.LiteralType(values):
            return f"one of {', '.join(sorted(map(str, values)))}"
        case inspect.StrType(least, most):
            bounds = f" of {least or 0} to {most} characters" if most else ""
            return f"text{bounds}"
        case inspect.VarTupleType(min_length=least, max_length=most):
            return f"a list of {least or 0} to {most} of them"
        case inspect.IntType(ge=least, le=most):
            return f"a whole number from {least} to {most}"
        case inspect.FloatType(gt=above, le=most):
            return "a number" if above is None else f"a number above {above:g}, and at most {most:g}"
    raise TypeError(f"no field is a {kind}")


def _extra(name: str, value: object) -> PipelineInput:
    if isinstance(value, Images | Numbers | Options | Json | Tensors):
        return value
    try:
        converted: Scalar = msgspec.convert(value, Input)
    except msgspec.ValidationError:
        if isinstance(value, str):
            raise field_error(name, f"must be text of at most {MAX_TEXT} characters") from None
        if isinstance(value, int):
            raise field_error(name, "is out of range: at most 64 bits") from None
        what = "text, a number, true, false, null, an image or a list of numbers"
        raise field_error(name, f"must be {what}") from None
    return converted


def check_no_effect(name: str, value: object, no_effect: NoEffectField) -> None:
    """Raise ApiError 422 where a field of OpenAI's that has no effect here asks for one."""
    if value is not None and str(value).lower() not in no_effect.values:
        raise field_error(name, f"must be {' or '.join(no_effect.values)}, or left out: {no_effect.advice}")


def parse_size(size: str, inputs: dict[str, PipelineInput], names: FieldNames) -> dict[str, PipelineInput]:
    """Return height and width in pixels, nothing for auto."""
    if size == "auto":
        return {}
    match = _SIZE.fullmatch(size)
    if match is None:
        raise field_error("size", "must be WIDTHxHEIGHT in pixels, as in 1024x1024, or auto")
    if "height" in inputs or "width" in inputs:
        raise field_error("size", "says the same as height and width: give the one or the others")
    for side in ("height", "width"):
        names.learn(side, "size", f"the {side} in size, {match[side]},")
    return {side: int(match[side]) for side in ("height", "width")}
