"""Copy a pipeline for each request, with its own scheduler and guider, and map `guidance_scale` to the guider.

Schedulers and guiders keep state between steps: shared by two requests that alternate, they raise or make wrong images.
Some families take `guidance_scale` as an argument of a block; others ignore the argument and use that of their guider.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, cast

from diffusers import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from triptych.engines.parameters.aliases import GUIDANCE_SCALE
from triptych.engines.pipelines.component_settings import (
    GUIDANCE_SCALE_2,
    OF_SCHEDULER,
    SCHEDULER,
    SECOND_GUIDER,
    VAE,
    guiders_of,
    make_guider,
    make_scheduler,
    make_vae,
)
from triptych.engines.steps.denoiser_calls import parked_components, parking

__all__ = ["GUIDANCE_SCALE", "guidance", "has_guider", "request_copy", "set_guidance"]


def request_copy(
    pipeline: Any,
    inputs: Mapping[str, object] = MappingProxyType({}),
    *,
    encodes: bool = False,
    parks: bool = False,
    _made: dict[int, Any] | None = None,
) -> Any:
    """Copy a pipeline for one request: the copy shares all weights, and nothing that changes during a run.

    Pipelines inside of it are copied, too; a scheduler that several of them share is still shared.

    Args:
        pipeline: A `diffusers.ModularPipeline` or a classic pipeline.
        inputs: The inputs of the request by name, with the settings of `engines.pipelines.component_settings`.
            "guidance_scale" is set in guiders; None keeps their scale.
        encodes: Whether the copy is for an encoder, for which guidance is never turned off: some encoders fail without
            it, others make no negative embeddings.
        parks: Whether calls of its denoisers wait for whoever advances the run, so that calls of several runs can be
            computed together.

    Raises:
        InputError: A component does not take a setting.
    """
    mine = copy.copy(pipeline)
    made = {} if _made is None else _made
    for name, component in vars(pipeline).items():
        if isinstance(component, SchedulerMixin):
            if id(component) not in made:
                made[id(component)] = make_scheduler(component, inputs if name == SCHEDULER else {})
            setattr(mine, name, made[id(component)])
    # Copy inner pipelines last: the names of the outer one say which scheduler the request sets.
    inner = {name: value for name, value in inputs.items() if name not in OF_SCHEDULER}
    for name, component in vars(pipeline).items():
        if isinstance(component, DiffusionPipeline):
            setattr(mine, name, request_copy(component, inner, encodes=encodes, parks=parks, _made=made))
    for name, component in guiders_of(pipeline):
        guider = make_guider(component, inputs)
        guider = guider.new(**_changes(guider, _scale(inputs, name)))
        if encodes and guider.num_conditions < component.num_conditions:
            guider = component.new()
        setattr(mine, name, guider)
    if VAE in vars(pipeline):
        vars(mine)[VAE] = make_vae(vars(pipeline)[VAE], inputs)
    for name, component in list(parked_components(mine) if parks else ()):
        vars(mine)[name] = parking(component)
    return mine


def _scale(inputs: Mapping[str, object], guider: str) -> float | None:
    second = inputs.get(GUIDANCE_SCALE_2) if guider == SECOND_GUIDER else None
    return cast("float | None", inputs.get(GUIDANCE_SCALE) if second is None else second)


def set_guidance(pipeline: Any, guidance_scale: float | None) -> None:
    """Set the default guidance scale of a pipeline's guiders; None, or the scale that they have, changes nothing."""
    if guidance_scale is None or guidance(pipeline) in (None, guidance_scale):
        return
    for name, component in list(guiders_of(pipeline)):
        setattr(pipeline, name, component.new(**_changes(component, guidance_scale)))


def _changes(guider: Any, guidance_scale: float | None) -> dict[str, object]:
    if guidance_scale is None or GUIDANCE_SCALE not in guider.config:
        return {}
    without = 0.0 if guider.config.get("use_original_formulation") else 1.0
    # Enable a guider that the model has turned off if the request sets a scale.
    switch = {"enabled": True} if guidance_scale > without and "enabled" in guider.config else {}
    return {GUIDANCE_SCALE: guidance_scale, **switch}


def has_guider(pipeline: Any) -> bool:
    """Whether a pipeline has a guider with a scale."""
    return any(_guiders(pipeline))


def guidance(pipeline: Any) -> float | None:
    """Return the default scale of a pipeline's guider; None if it has no guider or the guider is off."""
    guider = next(_guiders(pipeline), None)
    if guider is None or not guider.config.get("enabled", True):
        return None
    return float(guider.config[GUIDANCE_SCALE])


def _guiders(pipeline: Any) -> Iterator[Any]:
    return (guider for _, guider in guiders_of(pipeline) if GUIDANCE_SCALE in guider.config)


class _OnlyOnce(logging.Filter):
    """Logs the warning that guiders are experimental once, not for each request."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "experimental" not in record.getMessage():
            return True
        first, self.seen = not self.seen, True
        return first


logging.getLogger("diffusers.guiders.guider_utils").addFilter(_OnlyOnce())
