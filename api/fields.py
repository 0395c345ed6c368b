"""What every request for media may say, and how it becomes the pipeline's inputs."""

from __future__ import annotations

import re
from typing import Annotated, Final, NamedTuple, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, inspect

from triptych.api.body import check_length
from triptych.api.errors import ApiError, refused
from triptych.api.forms import Fields
from triptych.api.names import Names
from triptych.roles.messages.work import MAX_SEED, Json, Numbers, Options, Pictures, Scalar, Tensors
from triptych.roles.messages.work import Input as PipelineInput

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


class Neutral(NamedTuple):
    """A field of OpenAI's that has no effect here: the values that ask for none, and what to do about the others."""

    values: tuple[str, ...]
    advice: str


_STREAM: Final = "nothing is streamed yet; send Prefer: respond-async, and ask GET /v1/requests/ID how far it is"
NEUTRAL: Final = {
    "background": Neutral(("auto", "opaque"), "pictures have no transparent background"),
    "input_fidelity": Neutral(("low",), "strength says how much of a picture is kept, where a model has it"),
    "moderation": Neutral(("auto", "low"), "nothing is moderated here"),
    "partial_images": Neutral(("0",), _STREAM),
    "quality": Neutral(("auto", "standard"), "num_inference_steps says how much work is put into a picture"),
    "stream": Neutral(("false", "0"), _STREAM),
    "style": Neutral(("natural", "vivid"), "the prompt says in which style"),
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
    """Of the first picture, the next has the next; or a list with one for each."""
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
    body, own, names = fields.values, kind.__struct_fields__, fields.names
    given = {name: body[name] for name in own if body.get(name) is not None}
    if fields.texts and isinstance(seeds := given.get("seed"), str) and "," in seeds:
        given["seed"] = [seed.strip() for seed in seeds.strip("[] ").split(",")]
    try:
        wanted = msgspec.convert(given, kind, strict=not fields.texts)
    except msgspec.ValidationError as error:
        raise misfit(error, kind) from None
    inputs: dict[str, PipelineInput] = {name: value for name in _INPUTS if (value := getattr(wanted, name)) is not None}
    for name, value in body.items():
        if name in NEUTRAL and name not in fields.taken:
            check_neutral(names.field(name), value, NEUTRAL[name])
        elif name not in own:
            inputs[name] = _extra(names.field(name), value)
    if len(inputs) > MAX_INPUTS:
        raise ApiError(422, f"the request has more than {MAX_INPUTS} inputs", code="invalid_value")
    if inputs.get("mask_image") is not None and inputs.get("image") is None:
        raise names.invalid("image", "is required: a mask needs the picture that it is for")
    inputs |= parse_size(wanted.size, inputs, names)
    check_length(inputs)
    return wanted, inputs


def misfit(error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> ApiError:
    """Make a 422 that says what the field that msgspec points at should be."""
    if missing := _MISSING.search(str(error)):
        return refused(missing["name"], "is required")
    at = _FIELD.search(str(error))
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    if at is None or at["name"] not in types:
        raise error
    return refused(at["name"], f"must be {in_words(inspect.type_info(types[at['name']]))}")


def in_words(kind: inspect.Type) -> str:
    """Describe the values of a type, such as "a whole number from 1 to 10"."""
    match kind:
        case inspect.UnionType(types):
            return " or ".join(in_words(one) for one in types if not isinstance(one, inspect.NoneType))
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
    if isinstance(value, Pictures | Numbers | Options | Json | Tensors):
        return value
    try:
        converted: Scalar = msgspec.convert(value, Input)
    except msgspec.ValidationError:
        if isinstance(value, str):
            raise refused(name, f"must be text of at most {MAX_TEXT} characters") from None
        if isinstance(value, int):
            raise refused(name, "is out of range: at most 64 bits") from None
        what = "text, a number, true, false, null, a picture or a list of numbers"
        raise refused(name, f"must be {what}") from None
    return converted


def check_neutral(name: str, value: object, neutral: Neutral) -> None:
    """Raise ApiError 422 where a field of OpenAI's that has no effect here asks for one."""
    if value is not None and str(value).lower() not in neutral.values:
        raise refused(name, f"must be {' or '.join(neutral.values)}, or left out: {neutral.advice}")


def parse_size(size: str, inputs: dict[str, PipelineInput], names: Names) -> dict[str, PipelineInput]:
    """Return height and width in pixels, nothing for auto."""
    if size == "auto":
        return {}
    match = _SIZE.fullmatch(size)
    if match is None:
        raise refused("size", "must be WIDTHxHEIGHT in pixels, as in 1024x1024, or auto")
    if "height" in inputs or "width" in inputs:
        raise refused("size", "says the same as height and width: give the one or the others")
    for side in ("height", "width"):
        names.learn(side, "size", f"the {side} in size, {match[side]},")
    return {side: int(match[side]) for side in ("height", "width")}
