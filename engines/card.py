"""The card of a model: its name and task, the defaults of its parameters and the values they may take.

A card is the file `triptych.json` in the model's folder:

    {"name": "shapes", "family": "flux", "task": "text-to-image",
     "defaults": {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 16},
     "ranges": {"num_inference_steps": [1, 50], "height": [64, 64, 8]}}

A range is [lowest, highest] or [lowest, highest, step]; a value is a multiple of the step. Imports no torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import msgspec

from engines.panels import ModelError

CARD_NAME: Final = "triptych.json"
INDEX_NAMES: Final = ("modular_model_index.json", "model_index.json")

_TEXT: Final = ("prompt", "prompt_2", "prompt_3", "negative_prompt", "negative_prompt_2", "negative_prompt_3")
_TYPES: Final[dict[str, type]] = {
    **dict.fromkeys(_TEXT, str),
    "height": int,
    "width": int,
    "num_frames": int,
    "num_inference_steps": int,
    "max_sequence_length": int,
    "guidance_scale": float,
    "true_cfg_scale": float,
    "frame_rate": float,
    "strength": float,
}
# What no model goes beyond, so that a slip of the finger does not take a device for an hour.
_RANGES: Final[dict[str, tuple[float, ...]]] = {
    "height": (8, 8192),
    "width": (8, 8192),
    "num_frames": (1, 4096),
    "num_inference_steps": (1, 1000),
    "max_sequence_length": (1, 8192),
    "guidance_scale": (0, 100),
    "true_cfg_scale": (0, 100),
    "frame_rate": (1, 240),
    "strength": (0, 1),
}
_MAX_TEXT: Final = 32_768
_MAX_NUMBER: Final = 2**53
_WORDS: Final = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}

Value = bool | int | float | str


class CardError(Exception):
    """A parameter of a request that the model does not take.

    Attributes:
        param: Its name.
        message: What is wrong with it, one sentence.

    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.message = message


class ModelCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model is and which parameters it takes."""

    name: str = ""
    """How people call it."""
    family: str = ""
    """Such as "flux" or "wan"."""
    task: str = ""
    """Such as "text-to-image"; "" is the family's first task, "any" is all that the folder can do."""
    defaults: dict[str, Value] = msgspec.field(default_factory=dict)
    """The value of each parameter that a request leaves out."""
    ranges: dict[str, tuple[float, ...]] = msgspec.field(default_factory=dict)
    """The lowest and highest value of a number, and the step that it is a multiple of."""

    def apply(self, inputs: Mapping[str, object], accepted: Collection[str] | None = None) -> dict[str, object]:
        """Fill in the defaults and check what a request asks for; `inputs` stays as it is.

        Args:
            inputs: Parameters by name; None stands for left out.
            accepted: Names that the pipeline takes (`PanelPipeline.accepted`), where they are known. Defaults
                of other names are left out then.

        Returns:
            The parameters to run with.

        Raises:
            CardError: A parameter is unknown, has the wrong type or is out of range.

        """
        types = {**{name: type(value) for name, value in self.defaults.items()}, **_TYPES}
        names = types.keys() if accepted is None else types.keys() & set(accepted)
        given = {name: value for name, value in inputs.items() if value is not None}
        for name in sorted(given.keys() - names):
            raise CardError(name, f"{self.name or 'This model'} has no such parameter.")
        merged = {**{name: value for name, value in self.defaults.items() if name in names}, **given}
        return {name: _checked(name, value, types[name], self._limits(name)) for name, value in merged.items()}

    def _limits(self, name: str) -> tuple[float, ...]:
        return self.ranges.get(name) or _RANGES.get(name, ())


def load_card(model: Path) -> ModelCard:
    """Read the card of a model; a folder without one gets a card made from its index.

    Raises:
        ModelError: There is no such folder, or its card cannot be understood.

    """
    index = load_index(model)
    family = str(index["_class_name"]).removesuffix("Pipeline").removesuffix("Modular").lower()
    path = model / CARD_NAME
    try:
        card = msgspec.json.decode(path.read_bytes(), type=ModelCard)
    except FileNotFoundError:
        return ModelCard(name=model.resolve().name, family=family)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"The card {path} cannot be read: {error}.") from error
    for name, limits in card.ranges.items():
        if len(limits) not in (2, 3) or limits[0] > limits[1] or (len(limits) == 3 and limits[2] <= 0):
            raise ModelError(
                f"The card {path} gives {name} the range {list(limits)}, but a range is [lowest, highest] or"
                " [lowest, highest, step]."
            )
    try:
        card.apply({})
    except CardError as error:
        raise ModelError(f"The card {path} forbids its own default of {error}") from error
    return msgspec.structs.replace(card, name=card.name or model.resolve().name, family=card.family or family)


def load_index(model: Path) -> dict[str, object]:
    """Read the index of a model folder in the diffusers layout.

    Raises:
        ModelError: It is not such a folder, or the index does not name a pipeline.

    """
    if not model.is_dir():
        raise ModelError(f"There is no model folder {model}: check the path of the model.")
    path = next((model / name for name in INDEX_NAMES if (model / name).is_file()), None)
    if path is None:
        raise ModelError(f"{model} is not a diffusers model: it has no {INDEX_NAMES[1]}.")
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"The index {path} cannot be read: {error}.") from error
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ModelError(f"The index {path} does not say which pipeline it is for (`_class_name`).")
    return index


def _checked(name: str, value: object, expected: type, limits: tuple[float, ...]) -> object:
    if expected is float and type(value) is int and abs(value) <= _MAX_NUMBER:
        value = float(value)
    if type(value) is not expected or (isinstance(value, float) and not math.isfinite(value)):
        raise CardError(name, f"It must be {_WORDS[expected]}.")
    if isinstance(value, str):
        _check_text(name, value)
    elif limits and isinstance(value, (int, float)):
        _check_range(name, value, limits)
    return value


def _check_text(name: str, value: str) -> None:
    if len(value) > _MAX_TEXT:
        raise CardError(name, f"It must be at most {_MAX_TEXT} characters long.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise CardError(name, "It must be valid Unicode.") from error


def _check_range(name: str, value: float, limits: tuple[float, ...]) -> None:
    low, high = limits[:2]
    if not low <= value <= high:
        raise CardError(name, f"It must be {low:g}." if low == high else f"It must be {low:g} to {high:g}.")
    step = limits[2] if len(limits) == 3 else 0
    if step and not math.isclose(value / step, round(value / step), abs_tol=1e-9):
        raise CardError(name, f"It must be a multiple of {step:g}.")
