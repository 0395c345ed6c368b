"""Other names of parameters, so that one name means the same for every family. Imports no torch.

Classifier-free guidance is `guidance_scale` in most families, and `true_cfg_scale` where `guidance_scale` is a number
that the model was distilled with; where a guider guides, both are its scale. The rate of frames is `fps` or
`frame_rate`; a pipeline that asks for neither still makes a video, whose file has one.
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
    """Add the names that a pipeline does not declare.

    Args:
        parameters: Those that it declares.
        settings: Those that set its parts; what it declares itself goes before them.
        guided: Whether it has a guider with a scale.
        guidance: The scale of that, where it is on.
        fps: Frames per second of its videos; 0 where it makes none.

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
    """Which parameters lead to some inputs of the pipeline, by name."""
    return tuple(parameter.name for parameter in parameters if (parameter.alias_of or parameter.name) in inputs)


def conflicting_names(inputs: Mapping[str, object], parameters: Collection[Parameter]) -> tuple[str, str] | None:
    """Find two names of one parameter that say different things: the alias, and what it is an alias of."""
    for parameter in parameters:
        name, other = parameter.name, parameter.alias_of
        if other and name in inputs and other in inputs and inputs[name] != inputs[other]:
            return name, other
    return None


def to_pipeline_names(
    taken: Collection[str], inputs: Mapping[str, object], parameters: Collection[Parameter]
) -> dict[str, object]:
    """Give inputs the names that the pipeline has for them.

    Args:
        taken: Names that it has.
        inputs: By any name; without conflicts. What the pipeline does not take, though it is public, is left out:
            it is about the file alone.
        parameters: Those that are public.

    """
    aliases = {parameter.name: parameter.alias_of for parameter in parameters if parameter.alias_of}
    public = names(parameters)
    meant = {aliases.get(name, name): value for name, value in inputs.items()}
    return {name: value for name, value in meant.items() if name in taken or name not in public}
