"""From what a pipeline declares to the parameters that a request may give.

Only what JSON and picture files can say is public: a tensor, a callback or a table of options is no parameter.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Final, get_args, get_origin

from engines.parameters import Default, Kind, Parameter

_PLAIN: Final = {str: Kind.TEXT, bool: Kind.BOOLEAN, int: Kind.INTEGER, float: Kind.NUMBER}
_KNOWN: Final = {
    **dict.fromkeys(("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2"), Kind.TEXT),
    **dict.fromkeys(("negative_prompt_3", "lyrics"), Kind.TEXT),
    **dict.fromkeys(("height", "width", "num_frames", "num_inference_steps", "max_sequence_length"), Kind.INTEGER),
    **dict.fromkeys(("guidance_scale", "true_cfg_scale", "strength", "frame_rate", "fps"), Kind.NUMBER),
    **dict.fromkeys(("sigmas", "timesteps"), Kind.NUMBERS),
    **dict.fromkeys(("image", "control_image", "video", "reference_images", "ip_adapter_image"), Kind.IMAGES),
    **dict.fromkeys(("mask_image", "last_image"), Kind.IMAGE),
}
"""Many inputs are declared without a type, or with one that says too much."""


def of_blocks(blocks: Any, also: Collection[str] = ()) -> tuple[Parameter, ...]:
    """The public inputs of modular blocks, and others that are known by name."""
    declared = {item.name: item for item in blocks.inputs if item.name}
    rows = [(name, item.type_hint, item.default, bool(item.required)) for name, item in declared.items()]
    return _public([*rows, *((name, None, None, False) for name in also if name not in declared)])


def of_call(function: Any, also: Collection[str] = ()) -> tuple[Parameter, ...]:
    """The public inputs of the `__call__` of a classic pipeline, and others that are known by name."""
    empty = inspect.Parameter.empty
    declared = inspect.signature(function, eval_str=True).parameters
    rows = [(item.name, item.annotation, item.default, item.default is empty) for item in declared.values()]
    return _public([*rows, *((name, None, None, False) for name in also if name not in declared)])


def _public(rows: Iterable[tuple[str, Any, Any, bool]]) -> tuple[Parameter, ...]:
    found = []
    for name, hint, default, required in rows:
        kind = _KNOWN.get(name) or _kind(hint)
        if kind is not None and not name.startswith("_"):
            found.append(Parameter(name, kind, _plain(default), required))
    return tuple(sorted(found, key=lambda parameter: parameter.name))


def _kind(hint: Any) -> Kind | None:
    options = set(_options(hint))
    plain = {_PLAIN[option] for option in options if option in _PLAIN}
    if len(plain) == 1:
        return plain.pop()
    return Kind.NUMBER if plain == {Kind.INTEGER, Kind.NUMBER} else None


def _options(hint: Any) -> Iterator[Any]:
    if isinstance(hint, types.UnionType) or str(get_origin(hint)) == "typing.Union":
        for argument in get_args(hint):
            yield from _options(argument)
    elif hint is not type(None):
        yield hint


def _plain(default: Any) -> Default:
    return default if isinstance(default, (bool, int, float, str)) else None
