"""Check the values of a request by the kinds and ranges of their parameters. Imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Final

from triptych.engines.parameters.schema import (
    IMAGE_KINDS,
    KIND_DESCRIPTIONS,
    REPLACES,
    TENSORS,
    Parameter,
    ParameterKind,
    Task,
)

Limits = tuple[float, ...]
"""(lowest, highest) or (lowest, highest, step), where a value must be a multiple of the step; () is no limit."""

# Beyond what any model takes, so that a typing error does not occupy a device for an hour.
RANGES: Final[Mapping[str, Limits]] = {
    **dict.fromkeys(("height", "width", "resolution", "output_resolution", "processing_resolution"), (8, 8192)),
    **dict.fromkeys(("num_frames", "frames", "video_length", "segment_frame_length"), (1, 4096)),
    **dict.fromkeys(("num_inference_steps", "prior_num_inference_steps", "decoder_num_inference_steps"), (1, 1000)),
    **dict.fromkeys(("max_sequence_length", "max_new_tokens"), (1, 8192)),
    **dict.fromkeys(("guidance_scale", "true_cfg_scale", "guidance_scale_2", "prior_guidance_scale"), (0, 100)),
    **dict.fromkeys(("audio_guidance_scale", "image_guidance_scale", "decoder_guidance_scale"), (0, 100)),
    **dict.fromkeys(("fps", "frame_rate", "driving_video_fps"), (1, 240)),
    **dict.fromkeys(("strength", "denoising_start", "denoising_end", "guidance_rescale", "eta"), (0, 1)),
    **dict.fromkeys(("control_guidance_start", "control_guidance_end", "decode_timestep"), (0, 1)),
    **dict.fromkeys(("audio_duration", "audio_duration_s", "audio_length_in_s", "max_seconds"), (0, 3600)),
    "controlnet_conditioning_scale": (0, 10),
    "ensemble_size": (1, 32),
    "layers": (1, 64),
    "lora_scale": (-4, 4),
    "clip_skip": (0, 64),
    **dict.fromkeys(("tile_sample_min_height", "tile_sample_min_width", "tile_sample_min_size"), (32, 8192)),
    **dict.fromkeys(("tile_sample_stride_height", "tile_sample_stride_width"), (16, 8192)),
    **dict.fromkeys(("tile_overlap_factor", "tile_overlap_factor_height", "tile_overlap_factor_width"), (0, 0.9)),
    "num_train_timesteps": (1, 10_000),
    "solver_order": (1, 4),
}
_BY_WORD: Final[Mapping[str, Limits]] = {
    **dict.fromkeys(("steps", "step", "sample", "reps", "tiles", "chunk"), (0, 1000)),
    **dict.fromkeys(("frames", "window"), (0, 4096)),
    **dict.fromkeys(("tokens", "length", "size", "resolution"), (0, 8192)),
    **dict.fromkeys(("seconds", "duration", "s"), (0, 3600)),
    "area": (64, 8192**2),
}
"""Limits by a word in the name, for parameters of few families: whatever takes time has a limit."""
_SCALARS: Final = frozenset({ParameterKind.TEXT, ParameterKind.INTEGER, ParameterKind.NUMBER, ParameterKind.BOOLEAN})
_STRUCTURED: Final = frozenset({ParameterKind.OPTIONS, ParameterKind.TEXTS, ParameterKind.JSON, ParameterKind.TENSORS})
ANY: Final = (-1e9, 1e9)
"""The limits of an unknown number, which must only be finite."""
_PAIR: Final = (-65_536, 65_536)
MAX_TEXT: Final = 32_768
"""Characters of a text."""
_MAX_ITEMS: Final = 4096
MAX_STEPS: Final = RANGES["num_inference_steps"][1]
"""The most steps of all images of a request together, unless a serving config allows more for one."""


class ParameterError(Exception):
    """A request has a parameter or a value that the model does not take.

    Attributes:
        param: The name of the parameter.
        message: A sentence whose subject is the name, such as "must be 64."
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param} {message}")
        self.param = param
        self.message = message


def check_task(inputs: Mapping[str, object], tasks: Sequence[Task]) -> None:
    """Check that the inputs of a request fit one of the tasks of a model.

    Args:
        inputs: The inputs by name; None and False count as missing.
        tasks: The tasks. If there is only one, its required inputs are checked elsewhere.

    Raises:
        ParameterError: The inputs belong to several tasks, or one is missing; the message lists the tasks.
    """
    if len(tasks) < 2:
        return
    given = {name for name, value in inputs.items() if value is not None and value is not False}
    telling = given & {name for task in tasks for name in task.takes}
    wrong = [(telling - set(task.takes), set(task.requires) - given) for task in tasks]
    extra, lacking = min(wrong, key=lambda names: (len(names[0]) + len(names[1]), len(names[0])))
    if not extra and not lacking:
        return
    listed = ", ".join(f"{task.name} ({', '.join(task.requires)})" for task in tasks)
    others = ", ".join(sorted(telling - extra)) or "nothing else"
    verb = "is required" if lacking else "cannot be given"
    name = min(lacking or extra)
    raise ParameterError(name, f"{verb} beside {others}: the tasks of this model are {listed}.")


def default_limits(name: str, kind: ParameterKind) -> Limits:
    """Return the limits of a parameter for which a serving config has none."""
    if kind is ParameterKind.PAIR:
        return _PAIR
    if kind not in (ParameterKind.INTEGER, ParameterKind.NUMBER, ParameterKind.NUMBERS):
        return ()
    words = [_BY_WORD[word] for word in name.split("_") if word in _BY_WORD]
    return RANGES.get(name) or (words[-1] if words else ANY)


def guess_kind(value: object) -> ParameterKind | None:
    """Guess the kind of a value whose parameter is unknown; None if unsupported."""
    if isinstance(value, bool):
        return ParameterKind.BOOLEAN
    if isinstance(value, str):
        return ParameterKind.TEXT
    if isinstance(value, int):
        return ParameterKind.INTEGER
    if isinstance(value, float):
        return ParameterKind.NUMBER
    if _numbers(value) is not None:
        return ParameterKind.NUMBERS
    if options_in(value):
        return ParameterKind.OPTIONS
    if tensor_names(value) is not None:
        return ParameterKind.TENSORS
    if parsed_json(value) is not value:
        return ParameterKind.JSON
    return None if _files(value) is None else ParameterKind.IMAGES


def validate(name: str, value: object, kind: ParameterKind, limits: Limits, *, many: bool = False) -> object:
    """Check the kind and range of a value.

    Args:
        name: The name of its parameter.
        value: A scalar, a list of numbers, an object with a list of numbers as `values`, or one with images as `files`.
        kind: The kind that it must have.
        limits: The limits of a number, or of each number of a list.
        many: Whether a list of numbers is allowed instead of a number.

    Returns:
        The value; a whole number given for a number as a float.

    Raises:
        ParameterError: The value has another kind or is out of range.
    """
    if kind is ParameterKind.NUMBER and type(value) is int and abs(value) <= 2**53:
        value = float(value)
    if many and _numbers(value):
        kind = ParameterKind.NUMBERS
    if not _is_a(kind, value):
        raise ParameterError(name, f"must be {KIND_DESCRIPTIONS[kind]}.")
    if isinstance(value, str):
        _check_text(name, value)
    elif isinstance(value, (int, float)):
        _check_range(name, value, limits)
    elif kind not in _STRUCTURED:  # `alternatives.check_options` checks those
        _check_list(name, value, kind, limits)
    return value


def list_values(value: object) -> tuple[object, ...] | None:
    """Return the values of a list of texts or numbers; None for any other value, such as a single text or number."""
    found = parsed_json(value)
    return tuple(found) if isinstance(found, list) else _numbers(found)


def list_length(value: object) -> int | None:
    """Return the length of a list of numbers; None for any other value."""
    numbers = _numbers(value)
    return None if numbers is None else len(numbers)


def tensor_names(value: object) -> tuple[str, ...] | None:
    """Return the names of the tensors of a value that has a file of them; None for any other value."""
    found = getattr(value, "tensors", None)
    return found if isinstance(found, tuple) else None


def check_tensors(inputs: Mapping[str, object], given: Collection[str], parameter: Parameter | None) -> dict[str, str]:
    """Check the names of the tensors of a request.

    Args:
        inputs: The inputs by name, with defaults.
        given: The names of the inputs that the request itself has.
        parameter: The parameter for tensors; None if it is not known.

    Returns:
        The parameters that are replaced by tensors, with the names of those.

    Raises:
        ParameterError: The pipeline does not take a tensor, or the request also has the parameter that it replaces.
    """
    found = tensor_names(inputs.get(TENSORS)) or ()
    for name in found:
        if parameter is not None and name not in parameter.choices:
            message = f"has {name[:64]}, which the pipeline does not take; it takes {', '.join(parameter.choices)}."
            raise ParameterError(TENSORS, message)
        if (other := REPLACES.get(name)) and other in given:
            raise ParameterError(TENSORS, f"has {name}, which replaces {other}: give the one or the other.")
    return {REPLACES[name]: name for name in found if name in REPLACES}


def check_count(name: str, value: object, every: int) -> None:
    """Raise ParameterError unless a whole number is 1 plus a multiple of `every`."""
    if every and type(value) is int and value > 0 and (value - 1) % every:
        below = value - (value - 1) % every
        raise ParameterError(name, f"must be 1 more than a multiple of {every}, such as {below} or {below + every}.")


def check_scalars(inputs: Mapping[str, object], parameters: Collection[Parameter]) -> None:
    """Check the kinds of scalars among the inputs of a pipeline, in which files are images and lists already.

    Raises:
        ParameterError: A scalar has the wrong kind, or a scalar is given for another parameter.
    """
    for parameter in parameters:
        value = inputs.get(parameter.name)
        if value is not None and (parameter.kind in _SCALARS or isinstance(value, (str, int, float))):
            validate(parameter.name, value, parameter.kind, (), many=parameter.many)


def _is_a(kind: ParameterKind, value: object) -> bool:
    if kind in _HOLDERS:
        return _HOLDERS[kind](value) is not None
    match kind:
        case ParameterKind.TEXT:
            return isinstance(value, str)
        case ParameterKind.BOOLEAN:
            return isinstance(value, bool)
        case ParameterKind.INTEGER:
            return type(value) is int
        case ParameterKind.NUMBER:
            return isinstance(value, float) and math.isfinite(value)
        case ParameterKind.NUMBERS:
            return bool(_numbers(value))
        case ParameterKind.PAIR:
            numbers = _numbers(value) or ()
            return len(numbers) == 2 and all(type(number) is int for number in numbers)
        case ParameterKind.TEXTS:
            texts = parsed_json(value)
            return isinstance(texts, str) or (
                isinstance(texts, list) and bool(texts) and all(isinstance(text, str) for text in texts)
            )
        case ParameterKind.JSON:
            return isinstance(parsed_json(value), (list, dict, str))
    return bool(_files(value))


def _numbers(value: object) -> tuple[int | float, ...] | None:
    """Return the numbers of a list, or of an object with `values`; None for any other value."""
    items = value if isinstance(value, (list, tuple)) else getattr(value, "values", None)
    if not isinstance(items, (list, tuple)):
        return None
    return tuple(items) if all(type(item) in (int, float) for item in items) else None


def parsed_json(value: object) -> object:
    """Return the parsed JSON of an object with `json`; any other value itself."""
    text = getattr(value, "json", None)
    return json.loads(text) if isinstance(text, str) else value


def options_in(value: object) -> Mapping[str, object] | None:
    """Return the options of a mapping, or of an object with one as `values`; None for any other value."""
    found = value if isinstance(value, Mapping) else getattr(value, "values", None)
    return found if isinstance(found, Mapping) else None


_HOLDERS: Final = {ParameterKind.OPTIONS: options_in, ParameterKind.TENSORS: tensor_names}


def _files(value: object) -> tuple[object, ...] | None:
    files = getattr(value, "files", None)
    return files if isinstance(files, tuple) else None


def _check_list(name: str, value: object, kind: ParameterKind, limits: Limits) -> None:
    items = (_files(value) if kind in IMAGE_KINDS else _numbers(value)) or ()
    if kind is ParameterKind.IMAGE and len(items) > 1:
        raise ParameterError(name, f"must be one image, not {len(items)}.")
    if len(items) > _MAX_ITEMS:
        raise ParameterError(name, f"must be at most {_MAX_ITEMS} {'images' if kind in IMAGE_KINDS else 'numbers'}.")
    for item in items:
        if isinstance(item, (int, float)):
            _check_range(name, item, limits)


def _check_text(name: str, value: str) -> None:
    if len(value) > MAX_TEXT:
        raise ParameterError(name, f"must be at most {MAX_TEXT} characters long.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ParameterError(name, "must be valid Unicode.") from error


def _check_range(name: str, value: float, limits: Limits) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ParameterError(name, "must be a finite number.")
    if isinstance(value, bool) or not limits:
        return
    low, high = limits[:2]
    if not low <= value <= high:
        raise ParameterError(name, f"must be {low:g}." if low == high else f"must be {low:g} to {high:g}.")
    step = limits[2] if len(limits) == 3 else 0
    if step and not math.isclose(value / step, round(value / step), abs_tol=1e-9):
        raise ParameterError(name, f"must be a multiple of {step:g}.")
