"""Give each request a scheduler and a guider of its own, and map one `guidance_scale` onto what the family has.

A scheduler keeps where it is and what it saw, a guider keeps its step: shared by two requests that take turns they
raise, or make wrong images. Some families take `guidance_scale` as an argument of a block, the others as a setting
of their guider, and ignore the argument.
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

__all__ = ["GUIDANCE_SCALE", "guidance", "has_guider", "request_copy", "set_guidance"]


def request_copy(
    pipeline: Any,
    inputs: Mapping[str, object] = MappingProxyType({}),
    *,
    encodes: bool = False,
    _made: dict[int, Any] | None = None,
) -> Any:
    """Copy a pipeline for one request: it shares all weights, and nothing that changes during a run.

    Pipelines inside of it are copied as well; a scheduler that several of them have is still one.

    Args:
        pipeline: A `diffusers.ModularPipeline`, or a classic one.
        inputs: Of the request, by name; what of them sets a part of the pipeline is described in `engines.settings`.
            "guidance_scale" is for its guiders, where it has some; None keeps what they have.
        encodes: Whether the copy is for an encoder, which then never guides less than it would by itself: some
            encoders fail without guidance, others make no negative embeddings.

    Raises:
        InputError: A part cannot be set so.
    """
    mine = copy.copy(pipeline)
    made = {} if _made is None else _made
    for name, component in vars(pipeline).items():
        if isinstance(component, SchedulerMixin):
            if id(component) not in made:
                made[id(component)] = make_scheduler(component, inputs if name == SCHEDULER else {})
            setattr(mine, name, made[id(component)])
    # Those inside of it come last: which scheduler of a request is whose is known by the names that the outer one has.
    inner = {name: value for name, value in inputs.items() if name not in OF_SCHEDULER}
    for name, component in vars(pipeline).items():
        if isinstance(component, DiffusionPipeline):
            setattr(mine, name, request_copy(component, inner, encodes=encodes, _made=made))
    for name, component in guiders_of(pipeline):
        guider = make_guider(component, inputs)
        guider = guider.new(**_changes(guider, _scale(inputs, name)))
        if encodes and guider.num_conditions < component.num_conditions:
            guider = component.new()
        setattr(mine, name, guider)
    if VAE in vars(pipeline):
        vars(mine)[VAE] = make_vae(vars(pipeline)[VAE], inputs)
    return mine


def _scale(inputs: Mapping[str, object], guider: str) -> float | None:
    second = inputs.get(GUIDANCE_SCALE_2) if guider == SECOND_GUIDER else None
    return cast("float | None", inputs.get(GUIDANCE_SCALE) if second is None else second)


def set_guidance(pipeline: Any, guidance_scale: float | None) -> None:
    """Set the scale of guidance of requests that give none; None, or the scale that it has, changes nothing."""
    if guidance_scale is None or guidance(pipeline) in (None, guidance_scale):
        return
    for name, component in list(guiders_of(pipeline)):
        setattr(pipeline, name, component.new(**_changes(component, guidance_scale)))


def _changes(guider: Any, guidance_scale: float | None) -> dict[str, object]:
    if guidance_scale is None or GUIDANCE_SCALE not in guider.config:
        return {}
    without = 0.0 if guider.config.get("use_original_formulation") else 1.0
    # Models that do not need guidance have it switched off; who asks for some gets it.
    switch = {"enabled": True} if guidance_scale > without and "enabled" in guider.config else {}
    return {GUIDANCE_SCALE: guidance_scale, **switch}


def has_guider(pipeline: Any) -> bool:
    """Whether a pipeline has a guider with a scale."""
    return any(_guiders(pipeline))


def guidance(pipeline: Any) -> float | None:
    """The scale of a pipeline's guider where a request gives none; None where it has no guider, or one that is off."""
    guider = next(_guiders(pipeline), None)
    if guider is None or not guider.config.get("enabled", True):
        return None
    return float(guider.config[GUIDANCE_SCALE])


def _guiders(pipeline: Any) -> Iterator[Any]:
    return (guider for _, guider in guiders_of(pipeline) if GUIDANCE_SCALE in guider.config)


class _OnlyOnce(logging.Filter):
    """Lets the notice that guiders are experimental through once, not for each request."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def filter(self, record: logging.LogRecord) -> bool:
        if "experimental" not in record.getMessage():
            return True
        first, self.seen = not self.seen, True
        return first


logging.getLogger("diffusers.guiders.guider_utils").addFilter(_OnlyOnce())
