"""The fields of a body, JSON or a form: images go to the upload store, and the text of a form becomes values."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any, Final, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from triptych.api.body import MAX_FORM_BYTES, MAX_JSON_BYTES, MAX_TEXT_BYTES, BodyLimiter, read_object
from triptych.api.errors import ApiError, field_error
from triptych.api.field_names import FieldNames
from triptych.api.head_client import HeadClient
from triptych.api.models import describe_model
from triptych.api.uploads import MAX_FILES, MAX_FRAMES, Size, Source, UploadService
from triptych.roles.messages.common import Json, Numbers, Options, Scalar
from triptych.roles.messages.requests import IMAGE_KINDS, KIND_DESCRIPTIONS, KNOWN_KINDS, ParameterKind, Task

MAX_FIELDS: Final = 128
MAX_NUMBERS: Final = 1000
MAX_OPTIONS: Final = 64
MAX_DOCUMENT: Final = 32_768
"""Characters of an input that is JSON."""
MAX_DEPTH: Final = 8
_JSON: Final = frozenset({ParameterKind.TEXTS, ParameterKind.JSON})

ALIASES: Final = {"mask": "mask_image", "input_reference": "image", "images": "image"}
"""OpenAI's names of inputs, and diffusers'; for models that have none of the former."""
Option: TypeAlias = (
    Annotated[str, Meta(max_length=1024)] | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | float | bool | None
)
_TYPES: Final = {ParameterKind.INTEGER: int, ParameterKind.NUMBER: float, ParameterKind.BOOLEAN: bool}


@dataclass
class Fields:
    """What a body gives, by name."""

    values: dict[str, object] = field(default_factory=dict)
    """As in JSON; images and lists of numbers as `Images` and `Numbers`."""
    from_form: bool = False
    """The values came as text, so that "4" may stand for 4."""
    names: FieldNames = field(default_factory=FieldNames)
    """What the client calls them."""
    model_inputs: frozenset[str] = frozenset()
    """Names of what the model takes, as far as that was asked for."""


async def read_fields(request: Request, own: frozenset[str], names: FieldNames | None = None) -> Fields:
    """Read the body of a request.

    Args:
        request: Its body is JSON or a multipart form.
        own: Names of fields that are no inputs of the pipeline, or always the same ones.
        names: What clients of this resource call things, unless they say otherwise.

    Raises ApiError: 400 (malformed), 408 (too slow), 413 (too long), 415 (neither JSON nor a form, or no image in a
    format that is taken), 422 (a value at fault), 429 and 503 (no room).
    """
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type not in ("application/json", "multipart/form-data"):
        message = "send JSON, with Content-Type: application/json, or a form, with multipart/form-data"
        raise ApiError(415, message, code="unsupported_media_type")
    body_limiter: BodyLimiter = request.app.state.body_limiter
    texts = content_type != "application/json"
    async with AsyncExitStack() as stack:
        chunks = await stack.enter_async_context(
            body_limiter.stream_chunks(request, MAX_FORM_BYTES if texts else MAX_JSON_BYTES)
        )
        given = await _read_form(request.headers, chunks, stack) if texts else await read_object(chunks)
        kinds, tasks = await _model_inputs(request, given, own)
        uploads: UploadService = request.app.state.uploads
        names = names or FieldNames()
        values = await _convert(_by_model_name(given, kinds, names), kinds, tasks, own, uploads, texts=texts)
        return Fields(values, texts, names, frozenset(kinds))


async def _read_form(headers: Headers, chunks: AsyncGenerator[bytes, None], stack: AsyncExitStack) -> dict[str, object]:
    parser = _CompleteFormParser(
        headers, chunks, max_files=2 * MAX_FRAMES, max_fields=MAX_FIELDS, max_part_size=MAX_TEXT_BYTES
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise ApiError(400, f"the form cannot be read: {error.message}", code="invalid_form") from None
    stack.push_async_callback(form.close)
    if not parser.ended:
        raise ApiError(400, "the form has no end", code="invalid_form")
    given: dict[str, object] = {}
    for name in form:
        values = form.getlist(name)
        files = [value for value in values if isinstance(value, UploadFile)]
        if len(values) > 1 and not files:
            raise field_error(name, f"is given {len(values)} times")
        given[name] = list(values) if files else values[0]
    return given


class _CompleteFormParser(MultiPartParser):
    """A form that can be told from one that was cut off."""

    ended = False

    def on_end(self) -> None:
        """Take note of the last boundary."""
        self.ended = True


async def _model_inputs(
    request: Request, given: Mapping[str, object], own: frozenset[str]
) -> tuple[Mapping[str, ParameterKind], tuple[Task, ...]]:
    """Kinds of the model's inputs, and its tasks; not asked for where there is nothing that they could decide."""
    if not {_without_brackets(name) for name in given} - own:
        return {}, ()
    head: HeadClient = request.app.state.head
    model = given.get("model")
    description = await describe_model(head, model if isinstance(model, str) else None)
    return {parameter.name: parameter.kind for parameter in description.parameters} or KNOWN_KINDS, description.tasks


class _ClientField(NamedTuple):
    """A field under the model's name for it."""

    param: str
    """The client's name."""
    value: object


def _by_model_name(
    given: Mapping[str, object], kinds: Mapping[str, ParameterKind], names: FieldNames
) -> dict[str, _ClientField]:
    """Give inputs the names that the model has for them."""
    named: dict[str, _ClientField] = {}
    for sent, value in given.items():
        param = _without_brackets(sent)
        name = param if param in kinds else ALIASES.get(param, param)
        if name in named:
            raise field_error(param, f"is given twice, also as {named[name].param}")
        names.learn(name, param)
        named[name] = _ClientField(param, value)
    return named


def _without_brackets(name: str) -> str:
    return name.removesuffix("[]")


async def _convert(
    given: Mapping[str, _ClientField],
    kinds: Mapping[str, ParameterKind],
    tasks: Sequence[Task],
    own: frozenset[str],
    uploads: UploadService,
    *,
    texts: bool,
) -> dict[str, object]:
    values: dict[str, object] = {}
    sizes: dict[str, Size] = {}
    for name, (param, value) in given.items():
        kind = None if name in own else kinds.get(name)
        has_files = isinstance(value, list) and any(isinstance(item, UploadFile) for item in value)
        if kind in IMAGE_KINDS and value is not None:
            values[name], sizes[name] = await uploads.save(param, _image_sources(param, value, kind))
        elif kind is ParameterKind.TENSORS and value is not None:
            values[name] = await uploads.save_tensors(param, _tensor_source(param, value))
        elif has_files or (value is not None and name not in own and KNOWN_KINDS.get(name) in IMAGE_KINDS):
            raise field_error(param, f"takes no image{_image_inputs_hint(kinds, tasks)}")
        elif texts and isinstance(value, str):
            values[name] = _parse_text(param, value, kind or KNOWN_KINDS.get(name))
        else:
            values[name] = value if name in own else _to_input(param, value, kind)
    if "mask_image" in sizes and sizes["mask_image"] != sizes.get("image", sizes["mask_image"]):
        param = given["mask_image"].param
        raise field_error(param, f"must be as large as the image, {sizes['image']}, not {sizes['mask_image']}")
    return values


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
        raise field_error(name, "is an empty list")
    sources = [_image_source(name, item) for item in given]
    if kind is ParameterKind.IMAGE and len(sources) > 1:
        raise field_error(name, f"must be one image, and {len(sources)} were given")
    most = MAX_FRAMES if kind is ParameterKind.IMAGE_LIST else MAX_FILES
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


def _parse_text(name: str, text: str, kind: ParameterKind | None) -> object:
    try:
        if kind in (ParameterKind.NUMBERS, ParameterKind.PAIR):
            return _to_numbers(name, msgspec.json.decode(text if text.lstrip().startswith("[") else f"[{text}]"))
        if kind is ParameterKind.OPTIONS:
            return _to_input(name, msgspec.json.decode(text, type=dict[str, object]), kind)
        if kind in _JSON and text.lstrip().startswith(("[", "{")):
            return _to_input(name, msgspec.json.decode(text), kind)
        if kind in _TYPES:
            return msgspec.convert(text, _TYPES[kind], strict=False)
    except msgspec.MsgspecError:
        raise field_error(name, f"must be {KIND_DESCRIPTIONS[kind or ParameterKind.TEXT]}") from None
    return text


def _to_input(name: str, value: object, kind: ParameterKind | None) -> object:
    """Take lists for numbers, and objects for options where some are taken; everything else is left as it is."""
    if kind in _JSON and isinstance(value, list | dict):
        return _json_document(name, value, kind)
    if isinstance(value, list):
        return _to_numbers(name, value)
    if not isinstance(value, dict) or kind is not ParameterKind.OPTIONS:
        return value
    if len(value) > MAX_OPTIONS:
        raise field_error(name, f"must have at most {MAX_OPTIONS} options")
    return Options({str(key): _option(name, str(key), item) for key, item in sorted(value.items())})


def _json_document(name: str, value: object, kind: ParameterKind | None) -> Json:
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
        converted: Scalar = msgspec.convert(value, Option)
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
