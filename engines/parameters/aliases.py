"""Aliases of parameters, so that a name means the same for every family. Imports no torch.

Classifier-free guidance is `guidance_scale` in most families, and `true_cfg_scale` where `guidance_scale` is an input
of a distilled model; for a pipeline with a guider, both are its scale. The frame rate is `fps` or `frame_rate`; `fps`
is added to pipelines that have neither, for the file of their video.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from triptych.engines.parameters.schema import Parameter, ParameterKind, names

GUIDANCE_SCALE: Final = "guidance_scale"
TRUE_CFG_SCALE: Final = "true_cfg_scale"
FPS: Final = "fps"


def with_aliases(
    parameters: Collection[Parameter],
    settings: Collection[Parameter] = (),
    *,
    guided: bool = False,
    guidance: float | None = None,
    fps: float = 0.0,
) -> tuple[Parameter, ...]:
    """Add the aliases and settings that a pipeline does not declare.

    Args:
        parameters: The parameters that it declares.
        settings: The parameters that set its components; a declared one of the same name has precedence.
        guided: Whether it has a guider with a scale.
        guidance: The scale of the guider; None if it is off.
        fps: The frames per second of its videos; 0 if it makes none.
    """
    public = {parameter.name: parameter for parameter in (*settings, *parameters)}
    if guided:
        public.setdefault(GUIDANCE_SCALE, Parameter(GUIDANCE_SCALE, ParameterKind.NUMBER, guidance))
        public.setdefault(TRUE_CFG_SCALE, Parameter(TRUE_CFG_SCALE, ParameterKind.NUMBER, alias_of=GUIDANCE_SCALE))
    if rate := public.get("frame_rate"):
        public.setdefault(FPS, Parameter(FPS, rate.kind, alias_of=rate.name))
    elif fps:
        public.setdefault(FPS, Parameter(FPS, ParameterKind.NUMBER, fps))
    return tuple(public[name] for name in sorted(public))


def public_names(inputs: Collection[str], parameters: Collection[Parameter]) -> tuple[str, ...]:
    """Return the names of the parameters that set some inputs of the pipeline."""
    return tuple(parameter.name for parameter in parameters if (parameter.alias_of or parameter.name) in inputs)


def conflicting_names(inputs: Mapping[str, object], parameters: Collection[Parameter]) -> tuple[str, str] | None:
    """Return an alias and its parameter if both are given with different values, else None."""
    for parameter in parameters:
        name, other = parameter.name, parameter.alias_of
        if other and name in inputs and other in inputs and inputs[name] != inputs[other]:
            return name, other
    return None


def to_pipeline_names(
    taken: Collection[str], inputs: Mapping[str, object], parameters: Collection[Parameter]
) -> dict[str, object]:
    """Rename inputs to the names of the pipeline.

    Args:
        taken: The names of the pipeline's inputs.
        inputs: The inputs by public name, without conflicts. Public ones that the pipeline does not take are dropped:
            they are about the output file.
        parameters: The public parameters.
    """
    aliases = {parameter.name: parameter.alias_of for parameter in parameters if parameter.alias_of}
    public = names(parameters)
    renamed = {aliases.get(name, name): value for name, value in inputs.items()}
    return {name: value for name, value in renamed.items() if name in taken or name not in public}
