"""Save what has changed in a run since its loop began, and put it into another run of the same request.

Nothing of the call stack is saved. The other run begins as the first did, skips the loop's steps, and then gets the
values that they would have made. `mark` tells what has changed, `freeze` makes values that `engines.codec` can pack,
and `thaw` puts them back.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Final

import numpy as np
import torch
from diffusers.guiders import BaseGuidance
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from PIL import Image

from triptych.engines.codec.codec import register_dataclass
from triptych.engines.codec.manifest import MAX_DEPTH

_SCALARS: Final = (bool, int, float, str, bytes, slice, torch.dtype, torch.device)
_NO_LEAF: Final = object()
_FIXED: Final = frozenset({"_internal_dict"})
"""Attributes of components that are their configuration."""


Mark = Callable[[object], bool]
"""Tells whether something is still the value that was marked, and untouched."""


class CheckpointError(Exception):
    """A run cannot be saved, or cannot go on from what was saved; it can still be run from its beginning."""


@register_dataclass
@dataclass(frozen=True)
class ComponentName:
    """Stands for a component of the pipeline.

    Attributes:
        name: Its name in the pipeline.
    """

    name: str


@register_dataclass
@dataclass(frozen=True)
class DeviceType:
    """Stands for a `torch.device`.

    Attributes:
        type: "cpu" or "cuda"; on any other than the CPU, the device of the run that goes on.
    """

    type: str


@register_dataclass
@dataclass(frozen=True)
class TensorSize:
    """Stands for a `torch.Size`.

    Attributes:
        dimensions: The numbers in it.
    """

    dimensions: tuple[int, ...]


@register_dataclass
@dataclass(frozen=True)
class ObjectState:
    """Stands for an object of a class of diffusers that is no component, such as a momentum buffer.

    Attributes:
        class_name: The module and the qualified name of its class, with a colon between them.
        attributes: Its attributes, frozen.
    """

    class_name: str
    attributes: dict[str, Any]


# Marks --------------------------------------------------------------------------------------------


def mark(value: object, depth: int = 0) -> Mark:
    """Return a test of whether something is still `value`, and untouched.

    A tensor is untouched while nothing has been written into it. The test may hold `value`.
    """
    if value is None or isinstance(value, _SCALARS):
        return lambda now: type(now) is type(value) and now == value
    if isinstance(value, torch.Tensor):
        return _mark_tensor(value)
    if isinstance(value, torch.Generator):
        state = value.get_state()
        return lambda now: now is value and torch.equal(state, value.get_state())
    if isinstance(value, np.ndarray):
        array = value.copy()
        return lambda now: now is value and bool(np.array_equal(array, value))
    if depth < MAX_DEPTH and type(value) in (list, tuple, torch.Size):
        return _mark_items(value, depth)  # type: ignore[arg-type]  # mypy does not narrow by `in`
    if depth < MAX_DEPTH and isinstance(value, dict):
        return _mark_mapping(value, depth)
    if depth < MAX_DEPTH and is_plain_object(value):
        attributes = _mark_mapping(vars(value), depth)
        return lambda now: now is value and attributes(vars(value))
    if isinstance(value, (torch.nn.Module, Image.Image, type)) or callable(value):
        return lambda now: now is value
    return lambda _: False


def _mark_tensor(tensor: torch.Tensor) -> Mark:
    if tensor.is_inference():  # whether it has been written to is not known
        return lambda _: False
    version = tensor._version
    return lambda now: now is tensor and tensor._version == version


def _mark_items(items: list[Any] | tuple[Any, ...], depth: int) -> Mark:
    marks = [mark(item, depth + 1) for item in items]

    def unchanged(now: object) -> bool:
        return (
            isinstance(now, (list, tuple))
            and type(now) is type(items)
            and len(now) == len(marks)
            and all(test(item) for test, item in zip(marks, now, strict=True))
        )

    return unchanged


def _mark_mapping(mapping: Mapping[Any, Any], depth: int) -> Mark:
    marks = mark_each(mapping, depth + 1)
    return lambda now: isinstance(now, dict) and now.keys() == marks.keys() and not changed(marks, now)


def mark_each(values: Mapping[Any, Any], depth: int = 0) -> dict[Any, Mark]:
    """Return a mark for each value, by its key."""
    return {key: mark(value, depth) for key, value in values.items()}


def changed(marks: Mapping[Any, Mark], values: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return the values that are new, or no longer what they were when they were marked."""
    return {key: value for key, value in values.items() if key not in marks or not marks[key](value)}


def is_plain_object(value: object) -> bool:
    """Whether a value is an object of diffusers whose attributes are all of its state."""
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (type, torch.nn.Module, FunctionType, MethodType, BaseOutput))
        and _is_of_diffusers(type(value))
    )


def own_components(pipeline: Any) -> dict[str, Any]:
    """Return the components of a request's pipeline that change during a run, by name: schedulers and guiders."""
    return {name: part for name, part in vars(pipeline).items() if isinstance(part, (SchedulerMixin, BaseGuidance))}


def component_names(pipeline: Any) -> dict[int, str]:
    """Return the names of a pipeline's components by their `id`."""
    parts = (SchedulerMixin, BaseGuidance, torch.nn.Module)
    return {id(part): name for name, part in vars(pipeline).items() if isinstance(part, parts)}


# Freeze -------------------------------------------------------------------------------------------


def freeze(value: Any, components: Mapping[int, str], path: str = "the run", depth: int = 0) -> Any:
    """Copy a value so that `engines.codec` can pack it and what the run does next does not change it.

    Args:
        value: A value of the run.
        components: As `component_names`.
        path: What the value is, for the error.
        depth: How deep it is nested.

    Raises:
        CheckpointError: It is of a type that cannot be saved.
    """
    if depth >= MAX_DEPTH:
        raise CheckpointError(f"{path} is nested deeper than {MAX_DEPTH} levels.")
    if id(value) in components:
        return ComponentName(components[id(value)])
    frozen = _freeze_leaf(value)
    if frozen is not _NO_LEAF:
        return frozen
    if type(value) in (list, tuple):
        return type(value)(freeze(item, components, f"{path}[{index}]", depth + 1) for index, item in enumerate(value))
    if type(value) is dict:
        return {key: freeze(item, components, f"{path}[{key!r}]", depth + 1) for key, item in value.items()}
    if isinstance(value, BaseOutput) and _is_of_diffusers(type(value)):
        return ObjectState(_class_name(value), freeze(dict(value.items()), components, path, depth + 1))
    if is_plain_object(value):
        return ObjectState(_class_name(value), freeze_attributes(value, components, path, depth + 1))
    raise CheckpointError(f"{path} is a {type(value).__module__}.{type(value).__qualname__}, which cannot be saved.")


def _freeze_leaf(value: Any) -> object:
    """Freeze a value that contains no others; returns `_NO_LEAF` for all others."""
    if value is None or type(value) in (bool, int, float, str, bytes, slice, torch.dtype):
        return value
    if isinstance(value, torch.Tensor):
        return freeze_tensor(value)
    if isinstance(value, torch.Generator):
        return value.clone_state()  # the run goes on with its own
    if isinstance(value, torch.device):
        return DeviceType(value.type)
    if isinstance(value, torch.Size):
        return TensorSize(tuple(value))
    if isinstance(value, (np.ndarray, np.generic, Image.Image)):
        return copy.copy(value)
    return _NO_LEAF


def freeze_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor with its memory format, since the kernels of a convolution follow it; a stride of 0 is not kept."""
    expanded = 0 in tensor.stride()
    return tensor.clone(memory_format=torch.contiguous_format if expanded else torch.preserve_format)


def freeze_attributes(
    value: Any,
    components: Mapping[int, str],
    path: str = "the run",
    depth: int = 0,
    names: Collection[str] | None = None,
) -> dict[str, Any]:
    """Freeze attributes of an object, without its configuration and its methods.

    Args:
        value: The object.
        components: As `component_names`.
        path: What it is, for the error.
        depth: How deep it is nested.
        names: The names of the attributes; None for all.

    Raises:
        CheckpointError: An attribute cannot be saved.
    """
    return {
        name: freeze(item, components, f"{path}.{name}", depth + 1)
        for name, item in vars(value).items()
        if (names is None or name in names) and name not in _FIXED and not _is_method(item)
    }


def _is_method(value: object) -> bool:
    return isinstance(value, (FunctionType, MethodType)) or hasattr(value, "__wrapped__")


def _class_name(value: object) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


# Thaw ---------------------------------------------------------------------------------------------


def thaw(saved: Any, now: Any, pipeline: Any) -> Any:
    """Return a saved value for another run.

    Args:
        saved: What `freeze` has made, perhaps packed and unpacked; it is not changed.
        now: What the other run has in its place. Generators and objects are set, not replaced: others may hold them.
        pipeline: The pipeline of the other run.

    Raises:
        CheckpointError: It names what is not there.
    """
    if isinstance(saved, ComponentName):
        if saved.name not in vars(pipeline):
            raise CheckpointError(f"There is no component {saved.name!r} here.")
        return vars(pipeline)[saved.name]
    if isinstance(saved, ObjectState):
        return _thaw_object(saved, now, pipeline)
    if isinstance(saved, dict):
        present = now if isinstance(now, dict) else {}
        return {key: thaw(value, present.get(key), pipeline) for key, value in saved.items()}
    if isinstance(saved, (list, tuple)):
        beside = [*(now if isinstance(now, (list, tuple)) else ()), *([None] * len(saved))]
        return type(saved)(thaw(value, other, pipeline) for value, other in zip(saved, beside, strict=False))
    return _thaw_leaf(saved, now)


def _thaw_leaf(saved: Any, now: Any) -> Any:
    if isinstance(saved, torch.Tensor):
        return saved.clone(memory_format=torch.preserve_format)
    if isinstance(saved, torch.Generator):
        if not isinstance(now, torch.Generator):
            return saved.clone_state()
        now.set_state(saved.get_state())
        return now
    if isinstance(saved, DeviceType):
        return now if isinstance(now, torch.device) and now.type == saved.type else torch.device(saved.type)
    if isinstance(saved, TensorSize):
        return torch.Size(saved.dimensions)
    return copy.copy(saved)


def thaw_attributes(saved: Mapping[str, Any], target: Any, pipeline: Any) -> None:
    """Set saved attributes of an object."""
    values = vars(target)
    for name, value in saved.items():
        values[name] = thaw(value, values.get(name), pipeline)


def _thaw_object(saved: ObjectState, now: Any, pipeline: Any) -> Any:
    cls = find_class(saved.class_name)
    if issubclass(cls, BaseOutput):
        return cls(**thaw(saved.attributes, now, pipeline))
    target = now if type(now) is cls else object.__new__(cls)
    thaw_attributes(saved.attributes, target, pipeline)
    return target


def find_class(name: str) -> type:
    """Return a class of diffusers whose objects can be saved.

    Nothing is imported: the run that goes on has done so, and the name may come from anywhere.

    Args:
        name: As in `ObjectState`.

    Raises:
        CheckpointError: There is no such class, or its objects are not saved.
    """
    module_name, _, qualified_name = name.partition(":")
    if module_name.partition(".")[0] != "diffusers":
        raise CheckpointError(f"{name!r} is not a class of diffusers.")
    found: object = sys.modules.get(module_name)
    for attribute in qualified_name.split("."):
        found = vars(found).get(attribute) if hasattr(found, "__dict__") else None
    if not isinstance(found, type) or not _is_of_diffusers(found) or issubclass(found, torch.nn.Module):
        raise CheckpointError(f"There is no class {name!r} here whose objects are saved.")
    return found


def _is_of_diffusers(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "diffusers"
