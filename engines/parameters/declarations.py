"""Derive the parameters of a request from the inputs that a pipeline declares. Imports no torch.

An input is public if JSON or image files can express it; a callback, for example, is not. All tensors are one
parameter, a file. The kind of an input follows from its declared type, else from its name, else from its default.
"""

from __future__ import annotations

import inspect
import math
import types
from collections import abc
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal, Union, get_args, get_origin

from PIL import Image

from triptych.engines.parameters.schema import (
    KNOWN_KINDS,
    LATENT,
    OUTPUT_TYPE,
    TENSORS,
    Default,
    Parameter,
    ParameterKind,
)

_PRECISELY: Final = {
    "mask_image": ParameterKind.IMAGE,
    "last_image": ParameterKind.IMAGE,
    "video": ParameterKind.IMAGE_LIST,
}
"""Kinds of inputs that are often declared as any image or images."""
_DRAWN: Final = frozenset({"image", "mask_image", "last_image"})
"""Inputs that a few pipelines declare as tensors although they take images."""
_ONE_IMAGE: Final = frozenset({"strength", "mask_image", "num_frames", "frame_rate", "fps"})
"""With one of these, `image` is one image, to be edited or as the first frame; several would be several jobs."""
_PLAIN: Final = {
    str: ParameterKind.TEXT,
    bool: ParameterKind.BOOLEAN,
    int: ParameterKind.INTEGER,
    float: ParameterKind.NUMBER,
}
_SEQUENCES: Final = (list, tuple, abc.Sequence, abc.Iterable)
_SAYS_NOTHING: Final = (None, type(None), Any, object, list, tuple, inspect.Parameter.empty)
_NUMERIC: Final = frozenset({ParameterKind.INTEGER, ParameterKind.NUMBER})
# A job has one seed and one output, and the format of its output does not concern the pipeline.
_NEVER: Final = frozenset(
    {
        *("generator", "seed", "output_type", "return_dict", "return_index", "batch_size", "debug"),
        *("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "num_designs_per_prompt"),
        *("num_prompts_per_image", "callback", "callback_steps", "callback_on_step_end_tensor_inputs"),
    }
)
_TENSORS: Final = frozenset({"Tensor", "FloatTensor", "LongTensor"})
_LONGEST: Final = 200


@dataclass(frozen=True)
class _Declared:
    name: str
    hint: Any
    default: Any
    required: bool
    description: str = ""
    structured: bool = False
    """Whether it may be public as a list of texts or as JSON."""


def parameters_of_blocks(blocks: Any, required: Collection[str] = ()) -> tuple[Parameter, ...]:
    """Return the parameters of modular blocks, sorted by name.

    Args:
        blocks: `ModularPipelineBlocks` of one task.
        required: The names of the inputs that the task requires.
    """
    rows = {
        item.name: _Declared(item.name, item.type_hint, item.default, bool(item.required), item.description or "")
        for item in blocks.inputs
        if item.name
    }
    return _public(rows.values(), required)


def parameters_of_call(function: Any, required: Collection[str] = ()) -> tuple[Parameter, ...]:
    """Return the parameters of the `__call__` of a classic pipeline, sorted by name.

    Args:
        function: The `__call__`, with annotations.
        required: The names of inputs that are required although they have a default.
    """
    try:
        declared = inspect.signature(function, eval_str=True).parameters
    except (NameError, TypeError):
        # An annotation cannot be evaluated; use the others.
        declared = inspect.signature(function).parameters
    empty = inspect.Parameter.empty
    fixed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    rows = [
        _Declared(
            item.name,
            item.annotation,
            None if item.default is empty else item.default,
            item.default is empty,
            structured=True,
        )
        for item in declared.values()
        if item.kind not in fixed and item.name != "self"
    ]
    return _public(rows, required)


def tensor_inputs_of_blocks(blocks: Any) -> tuple[str, ...]:
    """Return the names of the inputs of modular blocks that are tensors."""
    declared = {item.name: item.type_hint for item in blocks.inputs if item.name}
    public = {parameter.name for parameter in parameters_of_blocks(blocks)}
    return tuple(sorted(name for name, hint in declared.items() if name not in public and is_tensor(name, hint)))


def tensor_inputs_of_call(function: Any) -> tuple[str, ...]:
    """Return the names of the inputs of a `__call__` that are tensors."""
    try:
        declared = inspect.signature(function, eval_str=True).parameters
    except (NameError, TypeError):
        declared = inspect.signature(function).parameters
    public = {parameter.name for parameter in parameters_of_call(function)}
    found = {name for name, item in declared.items() if is_tensor(name, item.annotation)}
    return tuple(sorted(found - public))


def tensors_parameter(names: Iterable[str]) -> tuple[Parameter, ...]:
    """Return the parameter for tensors of some names; () if there are no names."""
    choices = tuple(sorted(names))
    text = "A safetensors file with tensors for inputs of the pipeline, by their names."
    return (Parameter(TENSORS, ParameterKind.TENSORS, description=text, choices=choices),) if choices else ()


def latent_parameter() -> Parameter:
    """Return the parameter with which a request asks for latents."""
    text = "latent: the result is a safetensors file of the latents, which are not decoded."
    return Parameter(OUTPUT_TYPE, ParameterKind.TEXT, description=text, choices=(LATENT,))


def returns_latents(function: Any) -> bool:
    """Whether the `__call__` of a classic pipeline knows `output_type="latent"`."""
    function = inspect.unwrap(function)
    return OUTPUT_TYPE in inspect.signature(function).parameters and LATENT in function.__code__.co_consts


def is_tensor(name: str, hint: Any) -> bool:
    """Whether an input is a tensor, by its declared type, else by its name."""
    if name in _NEVER or name.startswith("_") or "callback" in name:
        return False
    options = list(_options(hint))
    if any(getattr(option, "__name__", "") in _TENSORS for option in options):
        return True
    says_nothing = all(isinstance(option, str) or option in _SAYS_NOTHING for option in options)
    return says_nothing and is_internal(name)


def _public(rows: Iterable[_Declared], required: Collection[str]) -> tuple[Parameter, ...]:
    found = []
    declared = {row.name: row for row in rows}
    for row in declared.values():
        kind = None if is_internal(row.name) else _kind(row)
        if kind is None:
            continue
        if kind is ParameterKind.IMAGES and row.name == "image" and declared.keys() & _ONE_IMAGE:
            kind = ParameterKind.IMAGE
        default = _plain(row.default)
        nullable = row.default is not None and (kind is ParameterKind.TEXTS or _allows_none(row.hint))
        # Nearly all pipelines declare the prompt as optional but need it. An input with a default is not required.
        is_prompt = row.name == "prompt" and default is None
        needed = is_prompt or row.name in required or (row.required and default is None)
        many = row.structured and kind in _NUMERIC and ParameterKind.NUMBERS in kinds_of_type(row.hint)
        text = _sentence(row.description)
        found.append(Parameter(row.name, kind, default, needed, description=text, many=many, nullable=nullable))
    return tuple(sorted(found, key=lambda parameter: parameter.name))


def is_internal(name: str) -> bool:
    """Whether an input is never a parameter of a request, whatever its type."""
    return name in _NEVER or name.startswith("_") or name.endswith(("_embeds", "latents")) or "callback" in name


def _kind(row: _Declared) -> ParameterKind | None:
    declared = _choose(kinds_of_type(row.hint))
    if declared is ParameterKind.TEXTS:
        declared = KNOWN_KINDS.get(row.name, declared)
    structured = _structured(row) if row.structured else None
    if declared in (ParameterKind.IMAGE, ParameterKind.IMAGES, ParameterKind.IMAGE_LIST):
        return _PRECISELY.get(row.name, declared)
    if declared is not None and structured is not ParameterKind.TEXTS:
        return declared
    if structured is not None:
        return structured
    if all(isinstance(option, str) or option in _SAYS_NOTHING for option in _options(row.hint)):
        return KNOWN_KINDS.get(row.name) or _kind_of_default(row.default)
    return ParameterKind.IMAGE if row.name in _DRAWN else None


def _structured(row: _Declared) -> ParameterKind | None:
    """Return the kind of an input that is declared as texts, nested lists or a dictionary; None for others."""
    options = list(_options(row.hint))
    items = [item for option in options if get_origin(option) in _SEQUENCES for item in get_args(option)]
    if any(option is dict or get_origin(option) is dict for option in (*options, *items)):
        return ParameterKind.JSON
    if any(get_origin(item) in _SEQUENCES for item in items):
        found = set().union(*(kinds_of_type(item) for item in items))
        return (
            ParameterKind.IMAGE_LIST
            if found & {ParameterKind.IMAGE, ParameterKind.IMAGE_LIST}
            else ParameterKind.JSON
            if found
            else None
        )
    if str in items:
        # Several prompts would be several jobs.
        return KNOWN_KINDS.get(row.name, ParameterKind.TEXTS)
    return None


def kinds_of_type(hint: Any) -> set[ParameterKind]:
    """Return the public kinds that a type allows."""
    found = set()
    for option in _options(hint):
        if option in _PLAIN:
            found.add(_PLAIN[option])
        elif option is Image.Image:
            found.add(ParameterKind.IMAGE)
        elif get_origin(option) is Literal and all(isinstance(value, str) for value in get_args(option)):
            found.add(ParameterKind.TEXT)
        elif get_origin(option) in _SEQUENCES:
            found |= _kinds_of_sequence(option)
    return found


def _kinds_of_sequence(hint: Any) -> set[ParameterKind]:
    if get_args(hint) == (int, int):
        return {ParameterKind.PAIR}
    inner: set[ParameterKind] = set().union(*(kinds_of_type(item) for item in get_args(hint) if item is not Ellipsis))
    if ParameterKind.IMAGE in inner:
        return {ParameterKind.IMAGE_LIST}
    if inner & _NUMERIC:
        return {ParameterKind.NUMBERS}
    return {ParameterKind.TEXTS} if inner == {ParameterKind.TEXT} else set()


def _choose(kinds: set[ParameterKind]) -> ParameterKind | None:
    if {ParameterKind.IMAGE, ParameterKind.IMAGE_LIST} <= kinds:
        return ParameterKind.IMAGES
    # Prefer one to many: a job makes one output.
    for kind in (
        ParameterKind.IMAGE,
        ParameterKind.IMAGE_LIST,
        ParameterKind.NUMBER,
        ParameterKind.INTEGER,
        ParameterKind.BOOLEAN,
        ParameterKind.TEXT,
        ParameterKind.TEXTS,
        ParameterKind.PAIR,
    ):
        if kind in kinds:
            return kind
    return ParameterKind.NUMBERS if kinds else None


def _kind_of_default(default: Any) -> ParameterKind | None:
    if type(default) in _PLAIN:
        return _PLAIN[type(default)]
    if not isinstance(default, (list, tuple)) or not default or not all(type(item) in (int, float) for item in default):
        return None
    is_pair = isinstance(default, tuple) and [type(item) for item in default] == [int, int]
    return ParameterKind.PAIR if is_pair else ParameterKind.NUMBERS


def _options(hint: Any) -> Iterator[Any]:
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        for argument in get_args(hint):
            yield from _options(argument)
    elif hint is not type(None):
        yield hint


def _allows_none(hint: Any) -> bool:
    if isinstance(hint, types.UnionType) or get_origin(hint) is Union:
        return any(map(_allows_none, get_args(hint)))
    return hint is type(None)


def _plain(default: Any) -> Default:
    if isinstance(default, (list, tuple)) and (
        all(type(item) in (int, float) for item in default) or all(isinstance(item, str) for item in default)
    ):
        return tuple(default)
    if isinstance(default, float) and not math.isfinite(default):
        return None
    return default if isinstance(default, (bool, int, float, str)) else None


def _sentence(description: str) -> str:
    text = " ".join(description.split())
    if text.startswith("TODO"):
        return ""
    first = text.partition(". ")[0].rstrip(".")
    return f"{first}." if 0 < len(first) < _LONGEST else ""
