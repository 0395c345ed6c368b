"""One tiny request through the stages of a model in this process, to see whether it can be served at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from PIL import Image

from triptych.engines.codec.codec import pack
from triptych.engines.parameters.schema import IMAGE_KINDS, MASKS, Parameter, ParameterKind, Signature
from triptych.engines.parameters.serving_config import ServingConfig
from triptych.engines.parameters.size_constraints import SIDES
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage

SMALLEST: Final = 64
"""Pixels of a side, where the model takes so few."""
FEWEST: Final = 2
"""Steps: some schedulers need a step before the last."""
SEED: Final = 0
_PROMPT: Final = "a red circle on a white background"
_FRAMES: Final = ("num_frames", "frames", "video_length")
_STEPS: Final = "num_inference_steps"
_FRAMES_IN: Final = 9
"""Pictures of a video that is given; those that are asked for may be less."""


def tiny_inputs(
    signature: Signature,
    serving_config: ServingConfig,
    side: int = SMALLEST,
    *,
    alpha: bool = False,
    minimal_steps: bool = True,
) -> dict[str, object]:
    """Make the inputs of the smallest request that a model says it takes. Pure.

    Args:
        signature: Of its pipeline.
        serving_config: Of the model; its defaults are kept where nothing smaller is known, its ranges are kept to.
        side: Pixels of a side of what is made, where the model takes so few; a video has one latent frame more for each
            `SMALLEST` of them.
        minimal_steps: Whether it has as few steps as can be, or as many as a request that does not say.
        alpha: Whether it takes images with an alpha channel.

    Returns:
        By public name, as `StagePipeline.encode` takes them.
    """
    taken = {parameter.name: parameter for parameter in signature.parameters}
    inputs: dict[str, object] = {name: value for name, value in serving_config.defaults.items() if name in taken}
    sides: dict[str, int] = {name: _least(taken[name], serving_config, side) for name in SIDES if name in taken}
    inputs.update(sides)
    size = (sides.get("width", side), sides.get("height", side))
    for name, parameter in taken.items():
        if name in _FRAMES:
            inputs[name] = 1 + max(side // SMALLEST, 1) * (parameter.every or 1)
        elif name == _STEPS and minimal_steps:
            inputs[name] = _least(parameter, serving_config, FEWEST)
        elif parameter.required and parameter.kind in IMAGE_KINDS:
            inputs[name] = _image(parameter, size, alpha=alpha)
        elif (parameter.required or name == "prompt") and name not in inputs and parameter.kind is ParameterKind.TEXT:
            inputs[name] = _PROMPT
    return inputs


def run(stages: Mapping[Stage, StagePipeline], inputs: Mapping[str, object], say: Callable[[str], None]) -> None:
    """Send one request through the stages, in order; what crosses is made ready to be stored, as in a system.

    Args:
        stages: The pipeline of each; one with several stages may stand there several times.
        inputs: Of the request.
        say: Called with the name of each stage before it runs.

    Raises:
        Exception: Whatever the pipeline raises.
    """
    say(Stage.ENCODER)
    state = stages[Stage.ENCODER].encode(inputs, SEED)
    _cross(state, stages, Stage.ENCODER, Stage.DENOISER)
    say(Stage.DENOISER)
    denoising = stages[Stage.DENOISER].denoise(state)
    while denoising.advance():
        pass
    state = denoising.result()
    _cross(state, stages, Stage.DENOISER, Stage.DECODER)
    say(Stage.DECODER)
    stages[Stage.DECODER].decode(state)


def _cross(state: dict[str, object], stages: Mapping[Stage, StagePipeline], one: Stage, other: Stage) -> None:
    if stages[one] is not stages[other]:
        pack(state)


def _least(parameter: Parameter, serving_config: ServingConfig, wanted: int) -> int:
    """The value that is next to `wanted` from above, of those that the model takes."""
    limits = serving_config.limits(parameter)
    low, high = (limits[0], limits[1]) if limits else (1.0, float(wanted))
    step = int(limits[2]) if len(limits) > 2 else 1
    value = max(wanted, int(low))
    value += -value % max(step, 1)
    return min(value, int(high))


def _image(parameter: Parameter, size: tuple[int, int], *, alpha: bool) -> Image.Image | list[Image.Image]:
    if parameter.name in MASKS:
        return Image.new("L", size, 255)
    made = Image.new("RGBA" if alpha else "RGB", size, "white")
    return [made] * _FRAMES_IN if parameter.kind is ParameterKind.IMAGE_LIST else made
