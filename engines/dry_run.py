"""One tiny request through the panels of a model in this process, to see whether it can be served at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from PIL import Image

from triptych.engines.card import ModelCard
from triptych.engines.codec import pack
from triptych.engines.geometry import SIDES
from triptych.engines.panels import Panel
from triptych.engines.parameters import MASKS, PICTURES, Kind, Parameter, Signature
from triptych.engines.pipeline import PanelPipeline

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
    signature: Signature, card: ModelCard, side: int = SMALLEST, *, alpha: bool = False, hurried: bool = True
) -> dict[str, object]:
    """Make the inputs of the smallest request that a model says it takes. Pure.

    Args:
        signature: Of its pipeline.
        card: Of the model; its defaults are kept where nothing smaller is known, its ranges are kept to.
        side: Pixels of a side of what is made, where the model takes so few; a video has one latent frame more for each
            `SMALLEST` of them.
        hurried: Whether it has as few steps as can be, or as many as a request that does not say.
        alpha: Whether it takes pictures with an alpha channel.

    Returns:
        By public name, as `PanelPipeline.encode` takes them.
    """
    taken = {parameter.name: parameter for parameter in signature.parameters}
    inputs: dict[str, object] = {name: value for name, value in card.defaults.items() if name in taken}
    sides: dict[str, int] = {name: _least(taken[name], card, side) for name in SIDES if name in taken}
    inputs.update(sides)
    size = (sides.get("width", side), sides.get("height", side))
    for name, parameter in taken.items():
        if name in _FRAMES:
            inputs[name] = 1 + max(side // SMALLEST, 1) * (parameter.every or 1)
        elif name == _STEPS and hurried:
            inputs[name] = _least(parameter, card, FEWEST)
        elif parameter.required and parameter.kind in PICTURES:
            inputs[name] = _picture(parameter, size, alpha=alpha)
        elif (parameter.required or name == "prompt") and name not in inputs and parameter.kind is Kind.TEXT:
            inputs[name] = _PROMPT
    return inputs


def run(panels: Mapping[Panel, PanelPipeline], inputs: Mapping[str, object], say: Callable[[str], None]) -> None:
    """Send one request through the panels, in order; what crosses is made ready to be stored, as in a system.

    Args:
        panels: The pipeline of each; one with several panels may stand there several times.
        inputs: Of the request.
        say: Called with the name of each panel before it runs.

    Raises:
        Exception: Whatever the pipeline raises.
    """
    say(Panel.ENCODER)
    state = panels[Panel.ENCODER].encode(inputs, SEED)
    _cross(state, panels, Panel.ENCODER, Panel.DENOISER)
    say(Panel.DENOISER)
    denoising = panels[Panel.DENOISER].denoise(state)
    while denoising.advance():
        pass
    state = denoising.result()
    _cross(state, panels, Panel.DENOISER, Panel.DECODER)
    say(Panel.DECODER)
    panels[Panel.DECODER].decode(state)


def _cross(state: dict[str, object], panels: Mapping[Panel, PanelPipeline], one: Panel, other: Panel) -> None:
    if panels[one] is not panels[other]:
        pack(state)


def _least(parameter: Parameter, card: ModelCard, wanted: int) -> int:
    """The value that is next to `wanted` from above, of those that the model takes."""
    limits = card.limits(parameter)
    low, high = (limits[0], limits[1]) if limits else (1.0, float(wanted))
    step = int(limits[2]) if len(limits) > 2 else 1
    value = max(wanted, int(low))
    value += -value % max(step, 1)
    return min(value, int(high))


def _picture(parameter: Parameter, size: tuple[int, int], *, alpha: bool) -> Image.Image | list[Image.Image]:
    if parameter.name in MASKS:
        return Image.new("L", size, 255)
    made = Image.new("RGBA" if alpha else "RGB", size, "white")
    return [made] * _FRAMES_IN if parameter.kind is Kind.IMAGE_LIST else made
