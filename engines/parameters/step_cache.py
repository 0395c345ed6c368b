"""The parameter with which a request computes without the step cache of its model. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from triptych.engines.parameters.schema import Parameter, ParameterKind

CACHE: Final = "cache"


def step_cache_parameters(cache: str) -> tuple[Parameter, ...]:
    """Return the parameters of a model with a step cache, as the topology writes it; () without one."""
    if not cache:
        return ()
    text = f"Whether steps may reuse what earlier ones have computed ({cache}); false takes longer and is exact."
    return (Parameter(CACHE, ParameterKind.BOOLEAN, True, description=text),)


def without_cache(inputs: Mapping[str, object]) -> dict[str, object]:
    """Return what a payload says of the cache: nothing, unless the request turns it off."""
    return {CACHE: False} if inputs.get(CACHE) is False else {}
