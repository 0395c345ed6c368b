"""Find out by trying whether a module computes each row of a merged call as it computes the row alone.

The shape of an argument does not say it. Flux 2 uses the position ids of the first row for all rows, and HunyuanVideo
1.5 decides for the whole batch whether there is an image. So the rules of `engines.steps.batching` are tried, once for
a class and its set of arguments:

- Before the first merged call, a call is merged with itself. What fails then is passed once, not concatenated, or the
  module is called alone.
- When calls first differ in an argument, that argument alone is altered in one of two rows, and each row is compared
  with the row alone. If either differs by more than a part of the effect of the alteration, it must be equal.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.utils import _pytree as pytree

from triptych.engines.steps.batching import (
    PER_ROW,
    Arguments,
    Leaf,
    LeafRule,
    Path,
    merge,
    split,
)
from triptych.engines.steps.denoiser_calls import DenoiserCall

ERROR: Final = 0.05
"""The part of the effect of an alteration by which a row may differ from the row alone, beside noise."""
NO_EFFECT: Final = 1e-5
"""An effect of less than this part of the output shows nothing."""
SAME: Final = 1e-3
SAME_IN_16_BITS: Final = 0.1
"""The part of the output by which a call merged with itself may differ from the call alone, by rounding.

A module whose experts are chosen by rounded numbers differs by more (HiDream), and is called alone.
"""
NOISE: Final = 4.0
"""How many times the noise of a call merged with itself a row may differ."""

_log: Final = logging.getLogger(__name__)


@dataclass
class MergeRules:
    """What is known about a class and a set of arguments.

    Attributes:
        alone: Why its calls are computed alone; "" if they can be merged.
        shared: The arguments that are passed once.
        per_row: Whether rows may differ in an argument; arguments that have not been tried are missing.
    """

    alone: str = ""
    shared: frozenset[Path] = frozenset()
    per_row: dict[Path, bool] = field(default_factory=dict)


class Prober:
    """Tries each class and set of arguments once, and remembers the rules."""

    def __init__(self) -> None:
        self._rules: dict[tuple[Any, tuple[Path, ...]], MergeRules] = {}
        self._noted: set[Any] = set()

    def rules(self, call: DenoiserCall, arguments: Arguments) -> MergeRules:
        """Return the rules for calls like this one; the first time, they are tried with it.

        Raises:
            Exception: Whatever the call raises alone; nothing is known then.
        """
        key = (type(call.module), arguments.paths)
        if key not in self._rules:
            began = time.monotonic()
            found = _merged_with_itself(call, arguments)
            self._rules[key] = found
            if found.alone:
                self.note_alone(call, found.alone)
            else:
                seconds = time.monotonic() - began
                _log.info("calls of %s are merged (tried in %.3f s)", type(call.module).__name__, seconds)
        return self._rules[key]

    def note_alone(self, call: DenoiserCall, reason: str) -> None:
        """Write to the log, once for a class, why its calls are computed alone."""
        if type(call.module) not in self._noted:
            self._noted.add(type(call.module))
            _log.info("calls of %s are computed alone: %s", type(call.module).__name__, reason)

    def try_leaf(self, call: DenoiserCall, arguments: Arguments, leaf: Leaf) -> None:
        """Find out whether rows may differ in an argument, and add it to the rules.

        Raises:
            torch.OutOfMemoryError: Two rows do not fit.
        """
        rules = self.rules(call, arguments)
        began = time.monotonic()
        rules.per_row[leaf.path] = _rows_may_differ(call, arguments, rules.shared, leaf)
        word = "may differ" if rules.per_row[leaf.path] else "must be equal"
        name, seconds = type(call.module).__name__, time.monotonic() - began
        _log.info("%s of rows of %s %s (tried in %.3f s)", path_name(leaf.path), name, word, seconds)


def path_name(path: Path) -> str:
    """Return a path as text."""
    return ".".join(map(str, path))


def _merged_with_itself(call: DenoiserCall, arguments: Arguments) -> MergeRules:
    before = _random_states(arguments)
    with torch.random.fork_rng(devices=_devices(arguments)):
        alone = call.forward(**arguments.copied())
        if not all(map(torch.equal, before, _random_states(arguments))):
            return MergeRules(alone="it draws random numbers")
    per_row = [leaf.path for leaf in arguments.leaves if leaf.rule in PER_ROW]
    reason = ""
    # Most take all; where one fails, one of them is likely to have no batch dimension, only its size.
    for shared in (frozenset[Path](), *(frozenset({path}) for path in per_row[1:])):
        try:
            rows = _computed(call, [arguments, arguments], shared)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a module may raise anything for arguments of wrong shapes
            reason = reason or f"{type(error).__name__}: {error}".partition("\n")[0]
            continue
        apart = max(difference(row, alone) for row in rows)
        if apart <= _tolerance(alone):
            return MergeRules(shared=shared)
        reason = reason or f"two equal rows differ from one by {apart:.0e}"
    return MergeRules(alone=reason)


def _rows_may_differ(call: DenoiserCall, arguments: Arguments, shared: frozenset[Path], leaf: Leaf) -> bool:
    if leaf.path in shared:
        return False
    alone = call.forward(**arguments.copied())
    noise = max(_distance(row, alone) for row in _computed(call, [arguments, arguments], shared))
    shown = False
    for altered in alterations(leaf.value):
        other = arguments.replace(leaf.path, altered)
        try:
            other_alone = call.forward(**other.copied())
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001, S112 - the module does not take this value, which no run gives it
            continue
        effect = _distance(other_alone, alone)
        # Not so for a value that is not a number, either: nothing can be compared with it.
        if not effect > max(NO_EFFECT * _size(alone), 2 * NOISE * noise):
            continue
        try:
            first, second = _computed(call, [arguments, other], shared)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # noqa: BLE001 - what the module raises for rows that differ says that they must not
            return False
        error = max(_distance(first, alone), _distance(second, other_alone))
        if not error < ERROR * effect + NOISE * noise:
            return False
        shown = True
    # One number for each row, such as the time, may have no effect on a model that was hardly trained.
    return shown or _is_number_per_row(leaf)


def _computed(call: DenoiserCall, rows: Sequence[Arguments], shared: frozenset[Path]) -> list[Any]:
    by_item = any(leaf.rule is LeafRule.ITEMS for leaf in rows[0].leaves)
    return split(call.forward(**merge(rows, shared)), rows[0].rows, len(rows), by_item=by_item)


def _is_number_per_row(leaf: Leaf) -> bool:
    return isinstance(leaf.value, torch.Tensor) and leaf.value.ndim <= 1


# Other values -------------------------------------------------------------------------------------------------


def alterations(value: Any) -> Iterator[Any]:
    """Yield other values of the same kind, with which a module can compute.

    Most are made of the value's own numbers, so that indices and masks stay valid. Zero is one of them, since it often
    means that something is missing.

    Args:
        value: A tensor, whose first dimension has the rows unless it has no dimensions; or a list of tensors.
    """
    if isinstance(value, list):
        yield from (list(items) for items in zip(*map(_alterations, value), strict=False))
    else:
        yield from _alterations(value)


def _alterations(value: torch.Tensor) -> Iterator[torch.Tensor]:
    dimensions = tuple(dimension for dimension in range(1, value.ndim) if value.shape[dimension] > 1)
    rolled = value.roll((1,) * len(dimensions), dimensions) if dimensions else value
    has_rolled = not torch.equal(rolled, value)
    if has_rolled:
        yield rolled
    if bool(((value == 0) | (value == 1)).all()) and value.ndim > 1 and bool(value.any()):  # a mask
        if not has_rolled:
            less = value.clone()
            less[..., -1] = 0
            yield less
    elif value.is_floating_point():
        if not has_rolled:
            yield value * 0.75 + 0.1
        if value.ndim > 1 and bool(value.any()):
            yield torch.zeros_like(value)
    elif not has_rolled and value.dtype is not torch.bool:
        halved = value // 2 + 1
        yield torch.where(halved == value, value - 1, halved)


# Comparison ---------------------------------------------------------------------------------------------------


def _numbers(output: Any) -> Iterator[torch.Tensor]:
    return (part.detach().double() for part in pytree.tree_leaves(output) if isinstance(part, torch.Tensor))


def _distance(left: Any, right: Any) -> float:
    pairs = zip(_numbers(left), _numbers(right), strict=True)
    # Equal infinities do not differ.
    squares = [float(torch.where(one == other, 0.0, one - other).square().sum()) for one, other in pairs]
    return math.sqrt(sum(squares))


def _size(output: Any) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in _numbers(output)))


def _tolerance(output: Any) -> float:
    dtypes = {part.dtype for part in pytree.tree_leaves(output) if isinstance(part, torch.Tensor)}
    return SAME_IN_16_BITS if dtypes & {torch.bfloat16, torch.float16} else SAME


def difference(output: Any, expected: Any) -> float:
    """Return the norm of the difference of two outputs, as a part of the norm of the second."""
    return _distance(output, expected) / max(_size(expected), 1e-30)


def _devices(arguments: Arguments) -> list[torch.device]:
    found = {leaf.value.device for leaf in arguments.leaves if isinstance(leaf.value, torch.Tensor)}
    return [device for device in found if device.type == "cuda"]


def _random_states(arguments: Arguments) -> list[torch.Tensor]:
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in _devices(arguments))]
