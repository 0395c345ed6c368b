"""Read a request for media: its typed fields, and the pipeline's inputs.

Here the form is checked: types, sizes, names, and that files are what they should be. What the values mean for the
model, the head checks (`engines.parameters.serving_config`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Generic, NamedTuple, TypeAlias, TypeVar

import msgspec
from msgspec import Meta, inspect
from starlette.datastructures import UploadFile

from triptych.api.body import MAX_TEXT_BYTES, read_body
from triptych.api.errors import ApiError, field_error
from triptych.api.services import ApiRequest
from triptych.api.uploads import MAX_FRAMES, MAX_IMAGES, ImageSize, Source, UploadService
from triptych.engines.parameters.schema import IMAGE_KINDS, KIND_DESCRIPTIONS, KNOWN_KINDS, ParameterKind, Task
from triptych.engines.parameters.validation import MAX_TEXT
from triptych.roles.messages.common import MAX_PARTIAL_IMAGES, MAX_SEED, Json, Numbers, Options, Priority, Scalar
from triptych.roles.messages.common import Input as PipelineInput
from triptych.roles.messages.requests import RequestRejected
from triptych.roles.messages.webhooks import WebhookUrl

MAX_INPUTS: Final = 64
MAX_SEEDS: Final = 10
MAX_NUMBERS: Final = 1000
MAX_OPTIONS: Final = 64
MAX_DOCUMENT: Final = 32_768
"""Characters of an input that is JSON."""
MAX_DEPTH: Final = 8
ALIASES: Final = {"mask": ("mask_image",), "input_reference": ("image", "video"), "images": ("image",)}
"""OpenAI's names of inputs, and diffusers', of which the first that a model has is meant; for models that have none of
the former."""

Text: TypeAlias = Annotated[str, Meta(max_length=MAX_TEXT)]
Integer: TypeAlias = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
ScalarInput: TypeAlias = Text | Integer | float | bool | None
OptionValue: TypeAlias = Annotated[str, Meta(max_length=1024)] | Integer | float | bool | None
Seed: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_SEED)]
Seeds: TypeAlias = Annotated[tuple[Seed, ...], Meta(min_length=1, max_length=MAX_SEEDS)]
Steps: TypeAlias = Annotated[int, Meta(ge=1, le=2**31 - 1)]
DeadlineSeconds: TypeAlias = Annotated[float, Meta(gt=0, le=604_800)]
_SIZE = re.compile(r"(?P<width>[1-9][0-9]{0,4})x(?P<height>[1-9][0-9]{0,4})")
_FIELD = re.compile(r" - at `\$\.(?P<name>\w+)")
_MISSING = re.compile(r"missing required field `(?P<name>[^`]+)`")
_STATUS: Final = {"invalid": 422, "full": 429, "conflict": 409, "unavailable": 503, "model_not_found": 404}
_FILE_KINDS: Final = IMAGE_KINDS | {ParameterKind.TENSORS}
_JSON_KINDS: Final = frozenset({ParameterKind.TEXTS, ParameterKind.JSON})
_SCALAR_TYPES: Final = {ParameterKind.INTEGER: int, ParameterKind.NUMBER: float, ParameterKind.BOOLEAN: bool}


class NoEffectField(NamedTuple):
    """A field of OpenAI's that has no effect here: the values that ask for none, and what to do about the others."""

    values: tuple[str, ...]
    advice: str


NO_EFFECT_FIELDS: Final = {
    "background": NoEffectField(("auto", "opaque"), "images have no transparent background"),
    "input_fidelity": NoEffectField(("low",), "strength says how much of an image is kept, where a model has it"),
    "moderation": NoEffectField(("auto", "low"), "nothing is moderated here"),
    "quality": NoEffectField(("auto", "standard"), "num_inference_steps says how much work is put into an image"),
    "style": NoEffectField(("natural", "vivid"), "the prompt says in which style"),
}


class MediaRequest(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's fields, then diffusers'; null is the same as not given.

    Any other field is an input of the pipeline; the head refuses it if the pipeline has none of that name.
    """

    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = ALIASES
    """Names of inputs by other names of clients."""
    no_effect: ClassVar[Mapping[str, NoEffectField]] = NO_EFFECT_FIELDS
    """By name; a parameter of the model goes before a field of the same name."""
    empty_is_absent: ClassVar[bool] = False
    """Whether null, "" and [] are the same as not given, for inputs that null means something for, too."""

    prompt: Text | None = None
    """Left out where a model takes none, which the head checks."""
    size: str = "auto"
    """WIDTHxHEIGHT in pixels, or auto: the model's default."""
    model: Annotated[str, Meta(max_length=128)] | None = None
    """By default the first."""
    user: str | None = None
    """Accepted for compatibility, and not kept."""
    seed: Seed | Seeds | None = None
    """Of the first image, the next has the next; or a list with one for each."""
    num_inference_steps: Steps | None = None
    guidance_scale: float | None = None
    negative_prompt: Text | None = None
    priority: Priority | None = None
    """A higher one goes first; by default 0. A key of the API may set no higher one than its own limit, which is the
    default where it is lower."""
    deadline_s: DeadlineSeconds | None = None
    """Seconds in which the result is wanted; `[head] policy = "deadline"` goes by it. Nothing ends because of it."""
    partial_images: Annotated[int, Meta(ge=0, le=MAX_PARTIAL_IMAGES)] | None = None
    """Most previews of each image while it is made; `GET /v1/requests/{id}` lists them."""
    webhook_url: WebhookUrl | None = None
    """Called with the request once it has ended, if the server lists its host."""
    metadata: bool | None = None
    """Whether the file says what it is made from; by default as `[head] metadata` of the topology."""


class FieldNames:
    """The names that a client uses for parameters, so that errors name its fields; by default the parameter's own."""

    def __init__(self, usual: Mapping[str, str] | None = None) -> None:
        self._fields = dict(usual or {})
        self._subjects: dict[str, str] = {}

    def learn(self, parameter: str, field: str, subject: str = "") -> None:
        """Note that the client sent `field` for `parameter`; messages begin with `subject`, by default the field."""
        self._fields[parameter] = field
        if subject:
            self._subjects[parameter] = subject

    def field(self, parameter: str) -> str:
        """Return the field that the client sent for a parameter."""
        return self._fields.get(parameter, parameter)

    def invalid(self, parameter: str, predicate: str) -> ApiError:
        """Make a 422 about a parameter; see `api.errors.field_error`."""
        return field_error(self.field(parameter), predicate, subject=self._subjects.get(parameter, ""))

    def rejected(self, rejected: RequestRejected) -> ApiError:
        """Map the head's refusal to an HTTP error."""
        if rejected.code == "invalid" and rejected.param:
            return self.invalid(rejected.param, rejected.message)
        return ApiError(
            _STATUS.get(rejected.code, 500),
            rejected.message,
            code="invalid_value" if rejected.code == "invalid" else rejected.code,
            param=self.field(rejected.param) if rejected.param else None,
            retry_after_s=rejected.retry_after_s,
        )


R = TypeVar("R", bound=MediaRequest, covariant=True)
S = TypeVar("S", bound=msgspec.Struct)

_TYPED_INPUTS: Final = ("prompt", "num_inference_steps", "guidance_scale", "negative_prompt")
"""Fields of `MediaRequest` that are inputs of the pipeline."""


@dataclass(frozen=True)
class ParsedRequest(Generic[R]):
    """A request for media, checked."""

    fields: R
    """Those of the API."""
    given: frozenset[str]
    """Names of those that the client sent, and not as null."""
    inputs: dict[str, PipelineInput]
    """Of the pipeline."""
    names: FieldNames


async def read_media_request(
    request: ApiRequest, kind: type[R], names: FieldNames | None = None, *, lenient: bool = False
) -> ParsedRequest[R]:
    """Read and check the body of a request.

    Args:
        request: Its body is JSON or a multipart form.
        kind: Its typed fields. Any other field is an input of the pipeline.
        names: The names that clients of this resource use, unless they send others.
        lenient: Whether JSON may have text where it stands for a number, as a form does.

    Raises ApiError that names the field at fault: 400 (malformed), 404 (no such model), 408 (too slow), 413 (too long),
    415 (neither JSON nor a form, or no image in a format that is taken), 422 (a wrong value), 429 and 503 (no room).
    """
    names = names or FieldNames()
    typed = frozenset(kind.__struct_encode_fields__)
    async with read_body(request) as body:
        given = {
            name: value
            for name, value in body.fields.items()
            if not kind.empty_is_absent or value not in (None, "", [])
        }
        kinds, tasks = await _model_inputs(request, given, typed)
        sent = _by_parameter(given, kinds, names, kind.aliases)
        for name, field in sent.items():
            if _has_files(field.value) and kinds.get(name) not in _FILE_KINDS:
                raise field_error(field.name, f"takes no image{_image_inputs_hint(kinds, tasks)}")
        fields = {name: field.value for name, field in sent.items() if name in typed and field.value is not None}
        parsed = _convert_fields(fields, kind, as_text=body.is_form or lenient)
        inputs: dict[str, PipelineInput] = {
            name: value for name in _TYPED_INPUTS if (value := getattr(parsed, name)) is not None
        }
        others = {name: field for name, field in sent.items() if name not in typed}
        for name in kind.no_effect.keys() & others.keys() - kinds.keys():
            check_no_effect(others.pop(name), kind.no_effect[name])
        uploads = request.state["services"].uploads
        inputs |= await _convert_inputs(others, kinds, tasks, uploads, is_form=body.is_form)
    if len(inputs) > MAX_INPUTS:
        raise ApiError(422, f"the request must have at most {MAX_INPUTS} inputs", code="invalid_value")
    if inputs.get("mask_image") is not None and inputs.get("image") is None:
        raise names.invalid("image", "is required: a mask needs the image that it is for")
    inputs |= parse_size(parsed.size, inputs, names)
    check_length(inputs, names)
    return ParsedRequest(parsed, frozenset(fields), inputs, names)


async def read_fields(request: ApiRequest, kind: type[S]) -> S:
    """Read a body that has the fields of `kind` and no others; raises ApiError as `read_media_request` does."""
    async with read_body(request) as body:
        for name in sorted(body.fields.keys() - set(kind.__struct_fields__)):
            raise field_error(name, f"cannot be given here: this takes {', '.join(kind.__struct_fields__)}")
        given = {name: value for name, value in body.fields.items() if value is not None}
        return _convert_fields(given, kind, as_text=body.is_form)


async def _model_inputs(
    request: ApiRequest, fields: Mapping[str, object], typed: frozenset[str]
) -> tuple[Mapping[str, ParameterKind], tuple[Task, ...]]:
    """Kinds of the model's inputs, and its tasks; not asked for where there are typed fields alone."""
    if not {_without_brackets(name) for name in fields} - typed:
        return {}, ()
    model = fields.get("model")
    description = await request.state["services"].head.kept_description(model if isinstance(model, str) else "")
    return {parameter.name: parameter.kind for parameter in description.parameters} or KNOWN_KINDS, description.tasks


class _ClientField(NamedTuple):
    """A field as it was sent."""

    name: str
    value: object


def _by_parameter(
    fields: Mapping[str, object],
    kinds: Mapping[str, ParameterKind],
    names: FieldNames,
    aliases: Mapping[str, tuple[str, ...]],
) -> dict[str, _ClientField]:
    """Return the fields by the names that the model has for them."""
    named: dict[str, _ClientField] = {}
    for sent, value in fields.items():
        field = _without_brackets(sent)
        meant = (field, *aliases.get(field, ()))
        name = next((name for name in meant if name in kinds), (meant[1:] or meant)[0])
        if name in named:
            raise field_error(field, f"is given twice, also as {named[name].name}: give one of them")
        names.learn(name, field)
        named[name] = _ClientField(field, value)
    return named


def _without_brackets(name: str) -> str:
    return name.removesuffix("[]")


def _convert_fields(fields: dict[str, object], kind: type[S], *, as_text: bool) -> S:
    if as_text and isinstance(seeds := fields.get("seed"), str) and "," in seeds:
        fields["seed"] = [seed.strip() for seed in seeds.strip("[] ").split(",")]
    try:
        return msgspec.convert(fields, kind, strict=not as_text)
    except msgspec.ValidationError as error:
        raise validation_error(error, kind) from None


def validation_error(error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> ApiError:
    """Make a 422 that says what the field that msgspec points at should be."""
    if missing := _MISSING.search(str(error)):
        return field_error(missing["name"], "is required")
    at = _FIELD.search(str(error))
    types = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
    if at is None or at["name"] not in types:
        raise error
    return field_error(at["name"], f"must be {describe_type(inspect.type_info(types[at['name']]))}")


def describe_type(kind: inspect.Type) -> str:
    """Describe the values of a type, such as "a whole number from 1 to 10"."""
    match kind:
        case inspect.Metadata(type=described):
            return describe_type(described)
        case inspect.UnionType(types):
            return " or ".join(describe_type(one) for one in types if not isinstance(one, inspect.NoneType))
        case inspect.LiteralType(values):
            return f"one of {', '.join(sorted(map(str, values)))}"
        case inspect.BoolType():
            return "true or false"
        case inspect.StrType(least, most):
            bounds = f" of {least or 0} to {most} characters" if most else ""
            return f"text{bounds}"
        case inspect.TupleType(items):
            return f"a list of {len(items)}, each {describe_type(items[0])}"
        case inspect.VarTupleType(min_length=least, max_length=most):
            return f"a list of {least or 0} to {most} of them"
        case inspect.IntType(ge=least, le=most):
            return f"a whole number from {least} to {most}"
        case inspect.FloatType(gt=above, le=most):
            return "a number" if above is None else f"a number above {above:g}, and at most {most:g}"
    raise TypeError(f"no field is a {kind}")


async def _convert_inputs(
    fields: Mapping[str, _ClientField],
    kinds: Mapping[str, ParameterKind],
    tasks: Sequence[Task],
    uploads: UploadService,
    *,
    is_form: bool,
) -> dict[str, PipelineInput]:
    values: dict[str, PipelineInput] = {}
    sizes: dict[str, ImageSize] = {}
    for name, (param, value) in fields.items():
        kind = kinds.get(name)
        if kind in IMAGE_KINDS and value is not None:
            video = kind is ParameterKind.IMAGE_LIST
            values[name], sizes[name] = await uploads.save(param, _image_sources(param, value, kind), video=video)
        elif kind is ParameterKind.TENSORS and value is not None:
            values[name] = await uploads.save_tensors(param, _tensor_source(param, value))
        elif value is not None and KNOWN_KINDS.get(name) in IMAGE_KINDS:
            raise field_error(param, f"takes no image{_image_inputs_hint(kinds, tasks)}")
        elif is_form and isinstance(value, str):
            values[name] = _parse_text(param, value, kind or KNOWN_KINDS.get(name))
        else:
            values[name] = _to_input(param, value, kind)
    if "mask_image" in sizes and sizes["mask_image"] != sizes.get("image", sizes["mask_image"]):
        param = fields["mask_image"].name
        raise field_error(param, f"must be as large as the image, {sizes['image']}, not {sizes['mask_image']}")
    return values


def _has_files(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, UploadFile) for item in value)


def _image_inputs_hint(kinds: Mapping[str, ParameterKind], tasks: Sequence[Task]) -> str:
    names = sorted(name for name, kind in kinds.items() if kind in IMAGE_KINDS)
    if names:
        return f": this model takes them for {', '.join(names)}"
    if not tasks:
        return ": this model takes no images"
    served = " and ".join(task.name for task in tasks)
    return f": this model takes no images, since it is served for {served} ([model] task of the topology)"


def _image_sources(name: str, value: object, kind: ParameterKind | None) -> list[Source]:
    given = value if isinstance(value, list) else [value]
    if not given:
        raise field_error(name, "is an empty list: leave it out, or give an image")
    sources = [_image_source(name, item) for item in given]
    if kind is ParameterKind.IMAGE and len(sources) > 1:
        raise field_error(name, f"must be one image, and {len(sources)} were given")
    most = MAX_FRAMES if kind is ParameterKind.IMAGE_LIST else MAX_IMAGES
    if len(sources) > most:
        raise field_error(name, f"must be at most {most} images, and {len(sources)} were given")
    return sources


def _tensor_source(name: str, value: object) -> Source:
    sources = value if isinstance(value, list) else [value]
    if len(sources) != 1 or not isinstance(sources[0], str | UploadFile):
        raise field_error(name, "must be one safetensors file: base64, or a file of a form")
    return sources[0]


def _image_source(name: str, item: object) -> Source:
    if isinstance(item, dict):  # as OpenAI has it in JSON
        if "file_id" in item:
            raise field_error(name, "has a file_id, and no files are kept here: send the image itself as image_url")
        item = item.get("image_url")
    if not isinstance(item, str | UploadFile):
        raise field_error(name, "must be an image: base64, a list of that, or files of a form")
    return item


def _parse_text(name: str, text: str, kind: ParameterKind | None) -> PipelineInput:
    try:
        if kind in (ParameterKind.NUMBERS, ParameterKind.PAIR):
            return _to_numbers(name, msgspec.json.decode(text if text.lstrip().startswith("[") else f"[{text}]"))
        if kind is ParameterKind.OPTIONS:
            return _to_input(name, msgspec.json.decode(text, type=dict[str, object]), kind)
        if kind in _JSON_KINDS and text.lstrip().startswith(("[", "{")):
            return _to_input(name, msgspec.json.decode(text), kind)
        if kind in _SCALAR_TYPES:
            return _to_input(name, msgspec.convert(text, _SCALAR_TYPES[kind], strict=False), kind)
    except msgspec.MsgspecError:
        raise field_error(name, f"must be {KIND_DESCRIPTIONS[kind or ParameterKind.TEXT]}") from None
    return _to_input(name, text, kind)


def _to_input(name: str, value: object, kind: ParameterKind | None) -> PipelineInput:
    """Convert a value that is no file."""
    if kind in _JSON_KINDS and isinstance(value, list | dict):
        return _to_json(name, value, kind)
    if isinstance(value, list):
        return _to_numbers(name, value)
    if isinstance(value, dict) and kind is ParameterKind.OPTIONS:
        if len(value) > MAX_OPTIONS:
            raise field_error(name, f"must have at most {MAX_OPTIONS} options")
        return Options({str(key): _option(name, str(key), item) for key, item in sorted(value.items())})
    try:
        converted: Scalar = msgspec.convert(value, ScalarInput)
    except msgspec.ValidationError:
        if isinstance(value, str):
            raise field_error(name, f"must be text of at most {MAX_TEXT} characters") from None
        if isinstance(value, int):
            raise field_error(name, "is out of range: at most 64 bits") from None
        what = "text, a number, true, false, null, an image or a list of numbers"
        raise field_error(name, f"must be {what}") from None
    return converted


def _to_json(name: str, value: object, kind: ParameterKind | None) -> Json:
    if kind is ParameterKind.TEXTS and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        raise field_error(name, f"must be {KIND_DESCRIPTIONS[ParameterKind.TEXTS]}")
    if _depth(value) > MAX_DEPTH:
        raise field_error(name, f"must have at most {MAX_DEPTH} lists or objects in each other")
    text = msgspec.json.encode(value).decode()
    if len(text) > MAX_DOCUMENT:
        raise field_error(name, f"must be at most {MAX_DOCUMENT} characters of JSON")
    return Json(text)


def _depth(value: object) -> int:
    """Count how many lists and objects lie in each other; JSON that is read cannot have more than a few hundred."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _option(name: str, key: str, value: object) -> Scalar | tuple[int | float, ...]:
    if isinstance(value, list):
        return _to_numbers(name, value).values
    try:
        converted: Scalar = msgspec.convert(value, OptionValue)
    except msgspec.ValidationError:
        words = "a text, a number, true, false, null or a list of numbers"
        raise field_error(name, f"has {key[:64]!r}, which must be {words}") from None
    return converted


def _to_numbers(name: str, value: list[Any]) -> Numbers:
    if len(value) > MAX_NUMBERS:
        raise field_error(name, f"must be at most {MAX_NUMBERS} numbers")
    if not all(isinstance(item, int | float) and not isinstance(item, bool) for item in value):
        raise field_error(name, "must be a list of numbers alone, if it is a list")
    if not all(isinstance(item, float) or -(2**63) <= item < 2**63 for item in value):
        raise field_error(name, "has a number that is out of range")
    return Numbers(tuple(value))


def check_no_effect(field: _ClientField, no_effect: NoEffectField) -> None:
    """Raise ApiError 422 where a field of OpenAI's that has no effect here asks for one."""
    if field.value is not None and str(field.value).lower() not in no_effect.values:
        words = [" or ".join(no_effect.values), "or left out"] if no_effect.values else ["left out"]
        raise field_error(field.name, f"must be {', '.join(words)}: {no_effect.advice}")


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


def check_length(inputs: Mapping[str, PipelineInput], names: FieldNames) -> None:
    """Raise ApiError 413 with the longest input where all of them, without their files, are too long for a message."""
    if len(msgspec.msgpack.encode(inputs)) > MAX_TEXT_BYTES:
        longest = max(inputs, key=lambda name: len(msgspec.msgpack.encode(inputs[name])))
        predicate = f"is too long: all that is no image in a request is at most {MAX_TEXT_BYTES} bytes"
        raise field_error(names.field(longest), predicate, status=413, code="too_long")
