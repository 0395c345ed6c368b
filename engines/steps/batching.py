"""Merge calls of a denoiser into one: which arguments are concatenated, and which must be equal.

The number of rows of a call is that of its first argument. Arguments are taken apart into leaves, through dicts, lists
and tuples, and each leaf has a rule by its shape (`LeafRule`). Shape alone can be wrong, so `engines.steps.probing`
checks the rules with the model. Outputs are split as the inputs were merged.
"""

from __future__ import annotations

import enum
import functools
import inspect
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import torch
import xxhash
from torch.utils.weak import WeakIdKeyDictionary

from triptych.engines.steps.denoiser_calls import DenoiserCall

Path = tuple[str | int, ...]
"""Where a leaf is among the arguments: the name of the argument, then keys and indices."""

MAX_ROWS: Final = 4
"""A first argument with more has no batch dimension: it is a packed sequence."""
_PLAIN: Final = (int, float, str, bool, type(None), torch.dtype, torch.device, enum.Enum)


class LeafRule(StrEnum):
    """How the values of a leaf in several calls become one value."""

    ROWS = "rows"
    """A tensor whose first dimension is the batch: concatenated."""
    SCALAR = "0-dim"
    """A tensor without dimensions: expanded to rows, then concatenated."""
    ITEMS = "items"
    """A list with one tensor for each row: lists are joined."""
    SHARED = "shared"
    """A tensor without a batch dimension: equal in all calls, passed once."""
    VALUE = "value"
    """Any other value: equal in all calls, passed once."""


PER_ROW: Final = frozenset({LeafRule.ROWS, LeafRule.SCALAR, LeafRule.ITEMS})
"""The rules by which rows of one call may differ from those of another."""


class UnbatchableError(Exception):
    """A call cannot be merged with others, or an output cannot be split; says why."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """One leaf of the arguments of a call.

    Attributes:
        path: Where it is.
        value: A tensor, a list of tensors, or a plain value.
        rule: The rule by its shape.
        outline: What must be equal in calls that are merged, whatever the rule.
    """

    path: Path
    value: Any
    rule: LeafRule
    outline: Hashable


@dataclass(frozen=True, slots=True)
class Arguments:
    """The arguments of a call by name, and their leaves.

    Attributes:
        values: The arguments by name.
        rows: The number of rows of the first one.
        leaves: All leaves, in a fixed order.
        outline: Calls of a module with the same outline have the same leaves, shapes and plain values.
    """

    values: Mapping[str, Any]
    rows: int
    leaves: tuple[Leaf, ...]
    outline: Hashable

    @property
    def paths(self) -> tuple[Path, ...]:
        """The paths of all leaves that are tensors, which name the set of arguments."""
        return tuple(leaf.path for leaf in self.leaves if leaf.rule is not LeafRule.VALUE)

    def copied(self) -> dict[str, Any]:
        """Return a copy of the arguments: some modules take items out of lists, or write into tensors."""
        return {name: _copied(value) for name, value in self.values.items()}

    def replace(self, path: Path, value: Any) -> Arguments:
        """Return these arguments with another value of the same shape for a leaf."""
        values = {name: _replaced(value_, (name,), path, value) for name, value_ in self.values.items()}
        return arguments_of(values, next(iter(self.values)))


@functools.cache
def parameter_names(cls: Any) -> tuple[str, ...]:
    """Return the names of the parameters of a module's `forward`, in order.

    Raises:
        UnbatchableError: It takes any number of positional arguments.
    """
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        raise UnbatchableError(f"{cls.__name__} takes any number of arguments")
    return tuple(parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD)


def arguments_of_call(call: DenoiserCall) -> Arguments:
    """Return the arguments of a call.

    Raises:
        UnbatchableError: It cannot be merged with others.
    """
    cls: Any = type(call.module)
    names = parameter_names(cls)
    if len(call.args) > len(names):
        raise UnbatchableError("more arguments than parameters")
    values = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
    first = next((name for name in names if name in values), None)
    if first is None:
        raise UnbatchableError("no argument")
    return arguments_of(values, first)


def arguments_of(values: Mapping[str, Any], first: str) -> Arguments:
    """Take arguments apart.

    Args:
        values: The arguments by name.
        first: The name of the one whose rows are the rows of the call.

    Raises:
        UnbatchableError: They cannot be merged with others.
    """
    values = {first: values[first], **values}
    rows = _rows(values[first])
    by_item = isinstance(values[first], list)
    leaves = tuple(leaf for name, value in values.items() for leaf in _leaves(value, (name,), rows, by_item))
    return Arguments(values, rows, leaves, (rows, *((leaf.path, leaf.rule, leaf.outline) for leaf in leaves)))


def _rows(first: Any) -> int:
    if isinstance(first, torch.Tensor) and first.ndim > 1 and 1 <= first.shape[0] <= MAX_ROWS:
        return first.shape[0]
    if isinstance(first, list) and 1 <= len(first) <= MAX_ROWS and _all_tensors(first):
        return len(first)
    raise UnbatchableError("the first argument has no batch dimension")


def _leaves(value: Any, path: Path, rows: int, by_item: bool) -> Iterator[Leaf]:
    if isinstance(value, torch.Tensor):
        rule = _rule(value, rows)
        yield Leaf(path, value, rule, _outline(value, 1 if rule is LeafRule.ROWS else 0))
    elif by_item and len(path) == 1 and isinstance(value, list) and len(value) == rows and _all_tensors(value):
        yield Leaf(path, value, LeafRule.ITEMS, tuple(_outline(item, 0) for item in value))
    elif isinstance(value, dict):
        yield Leaf(path, None, LeafRule.VALUE, (type(value).__name__, *value))
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key), rows, by_item)
    elif isinstance(value, (list, tuple)):
        yield Leaf(path, None, LeafRule.VALUE, (type(value).__name__, len(value)))
        for index, inner in enumerate(value):
            yield from _leaves(inner, (*path, index), rows, by_item)
    elif isinstance(value, _PLAIN):
        yield Leaf(path, value, LeafRule.VALUE, (type(value).__name__, value))
    else:
        raise UnbatchableError(f"{path[0]} has a {type(value).__name__}")  # such as a cache of keys and values


def _all_tensors(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, torch.Tensor) for value in values)


def _rule(tensor: torch.Tensor, rows: int) -> LeafRule:
    if tensor.ndim == 0:
        return LeafRule.SCALAR
    return LeafRule.ROWS if tensor.shape[0] == rows else LeafRule.SHARED


def _outline(tensor: torch.Tensor, without: int) -> Hashable:
    # The memory format is part of it: merged with another one, a row would be computed by other kernels.
    formats = [torch.contiguous_format]
    if tensor.ndim == 4:
        formats.append(torch.channels_last)
    elif tensor.ndim == 5:
        formats.append(torch.channels_last_3d)
    ordered = tuple(tensor.is_contiguous(memory_format=each) for each in formats)
    return (tuple(tensor.shape[without:]), tensor.dtype, tensor.device, ordered)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([_copied(inner) for inner in value])
    return value


def _replaced(value: Any, at: Path, path: Path, new: Any) -> Any:
    if at == path:
        return new
    if path[: len(at)] != at:
        return value
    if isinstance(value, dict):
        return {key: _replaced(inner, (*at, key), path, new) for key, inner in value.items()}
    return type(value)([_replaced(inner, (*at, index), path, new) for index, inner in enumerate(value)])


# Merge and split ----------------------------------------------------------------------------------------------


def merge(calls: Sequence[Arguments], shared: frozenset[Path] = frozenset()) -> dict[str, Any]:
    """Merge the arguments of calls with the same outline into those of one call.

    Args:
        calls: The arguments of each call; one may be there several times.
        shared: The paths of leaves that are passed once, although their rule by shape is another.
    """
    rules = {leaf.path: LeafRule.SHARED if leaf.path in shared else leaf.rule for leaf in calls[0].leaves}
    rows = calls[0].rows
    names = calls[0].values
    return {name: _merged([call.values[name] for call in calls], (name,), rules, rows) for name in names}


def _merged(values: list[Any], path: Path, rules: Mapping[Path, LeafRule], rows: int) -> Any:
    first, rule = values[0], rules[path]
    match rule:
        case LeafRule.ROWS:
            return torch.cat(values)
        case LeafRule.SCALAR:
            return torch.stack(values).repeat_interleave(rows)
        case LeafRule.ITEMS:
            return [item for value in values for item in value]
        case LeafRule.SHARED:
            return first
    if isinstance(first, dict):
        return {key: _merged([value[key] for value in values], (*path, key), rules, rows) for key in first}
    if isinstance(first, (list, tuple)):
        parts = [[value[index] for value in values] for index in range(len(first))]
        return type(first)([_merged(part, (*path, index), rules, rows) for index, part in enumerate(parts)])
    return first


def split(output: Any, rows: int, calls: int, *, by_item: bool) -> list[Any]:
    """Split the output of a merged call into those of its calls.

    Args:
        output: What the module has returned.
        rows: The number of rows of each call.
        calls: The number of calls.
        by_item: Whether lists were joined, so that lists of as many items as rows are split.

    Raises:
        UnbatchableError: A part of it does not have the rows of the calls.
    """
    return [_part(output, slice(rows * call, rows * (call + 1)), rows * calls, by_item) for call in range(calls)]


def _part(value: Any, at: slice, total: int, by_item: bool) -> Any:
    if isinstance(value, torch.Tensor):
        if value.ndim == 0 or value.shape[0] != total:
            raise UnbatchableError(f"an output has the shape {list(value.shape)}")
        return value[at]
    if by_item and isinstance(value, list) and len(value) == total:
        return value[at]
    if isinstance(value, dict):
        return type(value)(**{key: _part(inner, at, total, by_item) for key, inner in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)([_part(inner, at, total, by_item) for inner in value])
    if value is None:
        return None
    raise UnbatchableError(f"an output is a {type(value).__name__}")


# Values that must be equal ------------------------------------------------------------------------------------

_DIGESTS: Final[Any] = WeakIdKeyDictionary()


def digest(value: Any) -> Hashable:
    """Return a digest of the values of a tensor or of a list of tensors; equal values have the same.

    It is kept as long as the tensor is not changed: reading a tensor waits for the device.
    """
    if isinstance(value, list):
        return tuple(map(digest, value))
    version = None if value.is_inference() else value._version
    known_version, known = _DIGESTS.get(value, (None, b""))
    if version is not None and known_version == version:
        return bytes(known)
    dense = value.detach().to("cpu").clone(memory_format=torch.contiguous_format)
    found = xxhash.xxh3_128_digest(dense.reshape(-1).view(torch.uint8).numpy().data)
    _DIGESTS[value] = (version, found)
    return found
