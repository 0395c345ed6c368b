"""Step caches as a topology writes them: the kinds, their parameters, and the parser of `cache = "first_block:0.1"`.

A step cache takes outputs of earlier denoising steps for parts of later ones, which is faster and changes the image. To
add a kind, add its line here and its configuration in `engines/steps/step_caches.py`. Imports nothing of ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

Value: TypeAlias = bool | int | float | tuple[float, ...]


class StepCacheError(ValueError):
    """The text of a step cache is wrong; `str()` is the rest of a sentence that begins with the text."""


@dataclass(frozen=True)
class CacheParameter:
    """A parameter of a kind of cache.

    Attributes:
        name: Its name.
        default: Its default; its type is that of the values. A tuple is a list of numbers, written with blanks.
        low: The least value, of each number of a list.
        high: The greatest value.
    """

    name: str
    default: Value
    low: float = 0.0
    high: float = math.inf


@dataclass(frozen=True)
class StepCacheOptions:
    """A kind of cache and the values of all its parameters.

    Attributes:
        kind: One of `KINDS`.
        values: The values by name.
        text: As it was written.
    """

    kind: str
    values: Mapping[str, Value]
    text: str


_T: Final = 1000.0
"""The timestep of pure noise."""
KINDS: Final[Mapping[str, tuple[CacheParameter, ...]]] = {
    "first_block": (CacheParameter("threshold", 0.05, high=10.0),),
    "magcache": (
        CacheParameter("threshold", 0.06, high=10.0),
        CacheParameter("max_skip_steps", 3, low=1, high=1000),
        CacheParameter("retention_ratio", 0.2, high=1.0),
        CacheParameter("ratios", (), low=0.0, high=100.0),
    ),
    "taylorseer": (
        CacheParameter("interval", 5, low=2, high=1000),
        CacheParameter("warmup", 3, low=1, high=1000),
        CacheParameter("order", 1, low=0, high=4),
        CacheParameter("lite", False),
    ),
    "pab": (
        CacheParameter("interval", 2, low=2, high=1000),
        CacheParameter("cross_interval", 0, low=0, high=1000),
        CacheParameter("from_t", 100.0, high=_T),
        CacheParameter("to_t", 800.0, high=_T),
    ),
    "faster": (
        CacheParameter("interval", 2, low=2, high=1000),
        CacheParameter("weight", 0.5, high=1.0),
        CacheParameter("from_t", -1.0, low=-1.0, high=_T),
        CacheParameter("to_t", 681.0, high=_T),
    ),
}
"""The parameters of each kind; the first one can be written without its name."""


def parse_step_cache(text: str) -> StepCacheOptions | None:
    """Parse a step cache such as "first_block:0.1" or "taylorseer:4,order=2".

    Args:
        text: A kind; after a colon the value of its first parameter, parameters as NAME=VALUE, or both, with commas.

    Returns:
        The cache; None for "", which is no cache.

    Raises:
        StepCacheError: The kind or a parameter is unknown, or a value is wrong.
    """
    if not text:
        return None
    kind, colon, rest = text.partition(":")
    if kind not in KINDS:
        raise StepCacheError(f"is not a step cache: the kinds are {', '.join(KINDS)}")
    known = {parameter.name: parameter for parameter in KINDS[kind]}
    values: dict[str, Value] = {parameter.name: parameter.default for parameter in KINDS[kind]}
    given: set[str] = set()
    for number, item in enumerate(rest.split(",") if colon else ()):
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            if number:
                raise StepCacheError(f"has {item.strip()!r} where NAME=VALUE is needed")
            name, value = KINDS[kind][0].name, name
        if name not in known:
            raise StepCacheError(f"has no parameter {name!r}: those of {kind} are {', '.join(known)}")
        if name in given:
            raise StepCacheError(f"has {name} twice")
        given.add(name)
        values[name] = _parse(known[name], value)
    if "from_t" in values and not values["from_t"] < values["to_t"]:  # type: ignore[operator]  # both are numbers
        raise StepCacheError("has a from_t that is not less than its to_t")
    return StepCacheOptions(kind, values, text)


def _parse(parameter: CacheParameter, text: str) -> Value:
    default = parameter.default
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise StepCacheError(f"has {parameter.name}={text}, which must be true or false")
        return text == "true"
    if isinstance(default, tuple):
        numbers = tuple(_number(parameter, item) for item in text.split())
        if len(numbers) < 2:
            raise StepCacheError(f"has {parameter.name}={text}, which must be at least two numbers with blanks between")
        return numbers
    number = _number(parameter, text)
    if isinstance(default, int):
        if not number.is_integer():
            raise StepCacheError(f"has {parameter.name}={text}, which must be a whole number")
        return int(number)
    return number


def _number(parameter: CacheParameter, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not parameter.low <= number <= parameter.high:
        bounds = f"from {parameter.low:g} to {parameter.high:g}"
        raise StepCacheError(f"has {parameter.name}={text}, which must be a number {bounds}")
    return number
