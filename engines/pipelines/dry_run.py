"""Run one tiny request through the stages of a model in this process, to check that it can be served."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from PIL import Image

from triptych.engines.codec.codec import pack
from triptych.engines.parameters.schema import IMAGE_KINDS, MASKS, Parameter, ParameterKind, Signature
from triptych.engines.parameters.serving_config import ServingConfig
from triptych.engines.parameters.size_constraints import SIDES
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage, one_line

SMALLEST: Final = 64
"""The height and width in pixels, if the model allows it."""
FEWEST: Final = 2
"""The number of steps: some schedulers need a step before the last."""
FEWEST_CACHED: Final = 4
"""The number of steps in which a step cache has to reuse something: a model may have two denoisers."""
SEED: Final = 0
_PROMPT: Final = "a red circle on a white background"
_FRAMES: Final = ("num_frames", "frames", "video_length")
_STEPS: Final = "num_inference_steps"
_INPUT_FRAMES: Final = 9
"""The number of frames of an input video."""


def tiny_inputs(
    signature: Signature,
    serving_config: ServingConfig,
    side: int = SMALLEST,
    *,
    alpha: bool = False,
    minimal_steps: bool = True,
    fewest: int = FEWEST,
) -> dict[str, object]:
    """Return the inputs of the smallest request that a model takes. Pure.

    Args:
        signature: The signature of its pipeline.
        serving_config: The serving config of the model: its defaults are used where nothing smaller is known, within
            its ranges.
        side: The height and width of the output in pixels, if the model allows it; a video has one more latent frame
            for each `SMALLEST` of them.
        alpha: Whether the model takes images with an alpha channel.
        minimal_steps: Whether to use as few steps as possible; else the default of the model.
        fewest: The number of steps with `minimal_steps`, if the model allows it.

    Returns:
        The inputs by public name, for `StagePipeline.encode`.
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
            inputs[name] = _least(parameter, serving_config, fewest)
        elif parameter.required and parameter.kind in IMAGE_KINDS:
            inputs[name] = _image(parameter, size, alpha=alpha)
        elif (parameter.required or name == "prompt") and name not in inputs and parameter.kind is ParameterKind.TEXT:
            inputs[name] = _PROMPT
    return inputs


def run(stages: Mapping[Stage, StagePipeline], inputs: Mapping[str, object], say: Callable[[str], None]) -> None:
    """Run one request through the stages, and pack the payloads between processes as a cluster does.

    Args:
        stages: The pipeline of each stage; a pipeline of several stages is there several times.
        inputs: The inputs of the request.
        say: Is called with the name of each stage before it runs.

    Raises:
        Exception: Whatever the pipeline raises.
    """
    say(Stage.ENCODER)
    payload = stages[Stage.ENCODER].encode(inputs, SEED)
    _cross(payload, stages, Stage.ENCODER, Stage.DENOISER)
    say(Stage.DENOISER)
    denoising = stages[Stage.DENOISER].denoise(payload)
    while denoising.advance():
        pass
    payload = denoising.result()
    _cross(payload, stages, Stage.DENOISER, Stage.DECODER)
    say(Stage.DECODER)
    stages[Stage.DECODER].decode(payload)


def step_cache_problem(stages: Mapping[Stage, StagePipeline], inputs: Mapping[str, object]) -> str:
    """Run one request in which the step cache of the denoiser reuses whatever it can, and say what is wrong with it.

    Args:
        stages: As for `run`; afterwards the denoiser must not be used.
        inputs: The inputs of the request, with `FEWEST_CACHED` steps if possible.

    Returns:
        A sentence; "" if something was reused, or if there is no cache.
    """
    cache = stages[Stage.DENOISER].step_cache
    if cache is None:
        return ""
    payload = stages[Stage.ENCODER].encode(inputs, SEED)
    cache.reuse_eagerly()
    calls, computed = cache.calls, cache.computed
    denoising = stages[Stage.DENOISER].denoise(payload)
    try:
        while denoising.advance():
            pass
    except Exception as error:  # noqa: BLE001 - hooks of diffusers raise anything for a model that they do not expect
        return f'cache = "{cache.options.text}" fails with this model: {type(error).__name__}: {one_line(error)}.'
    if cache.calls - calls > cache.computed - computed:
        return ""
    return f'cache = "{cache.options.text}" reuses nothing with this model in a request of {denoising.step} step(s).'


def _cross(payload: dict[str, object], stages: Mapping[Stage, StagePipeline], one: Stage, other: Stage) -> None:
    if stages[one] is not stages[other]:
        pack(payload)


def _least(parameter: Parameter, serving_config: ServingConfig, wanted: int) -> int:
    """Return the smallest value of at least `wanted` that the model takes."""
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
    return [made] * _INPUT_FRAMES if parameter.kind is ParameterKind.IMAGE_LIST else made
