"""The serving config of a model: its name and task, and the defaults and ranges of its parameters.

It is the file `triptych.json` in the model's folder:

    {"name": "shapes", "family": "flux", "task": "text-to-image",
     "defaults": {"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 16},
     "ranges": {"num_inference_steps": [1, 50], "height": [64, 64, 8]}}

A range is [lowest, highest] or [lowest, highest, step]; a value must be a multiple of the step. Imports no torch.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from triptych.engines.parameters.aliases import FPS, GUIDANCE_SCALE, TRUE_CFG_SCALE, conflicting_names
from triptych.engines.parameters.alternatives import resolve_classes
from triptych.engines.parameters.schema import KNOWN_KINDS, TENSORS, Default, Parameter, ParameterKind, Task
from triptych.engines.parameters.validation import (
    MAX_STEPS,
    Limits,
    ParameterError,
    check_count,
    check_task,
    check_tensors,
    default_limits,
    guess_kind,
    list_length,
    validate,
)
from triptych.engines.stages import ModelError

__all__ = ["INDEX_NAMES", "SERVING_CONFIG_NAME", "ParameterError", "ServingConfig", "load_index", "load_serving_config"]

SERVING_CONFIG_NAME: Final = "triptych.json"
INDEX_NAMES: Final = ("modular_model_index.json", "model_index.json")
STEPS: Final = "num_inference_steps"
_LISTS_OF_STEPS: Final = ("sigmas", "timesteps")
_TEXT_LENGTH: Final = "max_sequence_length"
_UNKNOWN_LENGTH: Final = 1_000_000
"""Tokenizers without a limit have a number above this."""
_ALIKE: Final = 0.75
"""The least similarity, from 0 to 1, of a misspelt name to the right one."""

Value = bool | int | float | str


class ServingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The serving config of a model."""

    name: str = ""
    """The name of the model."""
    family: str = ""
    """The family of the model, such as "flux" or "wan"."""
    task: str | tuple[str, ...] = ""
    """The task, such as "text-to-image", or several; "" for those of the pipeline class, "any" for all."""
    defaults: dict[str, Value] = msgspec.field(default_factory=dict)
    """The defaults of parameters by name."""
    ranges: dict[str, tuple[float, ...]] = msgspec.field(default_factory=dict)
    """The lowest and highest value of numbers by name, and the step of which they are multiples."""
    max_tokens: int = 0
    """The most tokens of a prompt, if `ranges` has no limit; 0 for that of the tokenizers."""

    def apply(
        self,
        inputs: Mapping[str, object],
        parameters: Collection[Parameter] | None = None,
        tasks: Sequence[Task] = (),
    ) -> dict[str, object]:
        """Check the inputs of a request and add the defaults.

        Args:
            inputs: The inputs by public name; they are not changed. None counts as missing, except for parameters that
                are `nullable`. For the types of values see `validation.validate`.
            parameters: The parameters of the pipeline (`Signature.parameters`). If None, since they are not known yet,
                any name is allowed, nothing is required, and values are checked by the kinds of known names.
            tasks: The tasks of the model (`Signature.tasks`).

        Returns:
            The inputs with defaults, without the defaults of what the pipeline does not take.

        Raises:
            ParameterError: A parameter is unknown, missing, of the wrong kind or out of range, two names of one
                parameter have different values, or the request is for none of the tasks.
        """
        given = {name: value for name, value in inputs.items() if value is not None}
        taken = {parameter.name: parameter for parameter in parameters or ()}
        # Until the pipeline is known, keep nulls for the encoder, which knows what they mean, except for parameters
        # with a default here.
        nulls = inputs.keys() - given.keys() - {name for name, known in taken.items() if not known.nullable}
        if parameters is None:
            nulls -= self.defaults.keys()
            merged = {**self.defaults, **given}
        else:
            for name in sorted(given.keys() - taken.keys()):
                raise ParameterError(name, self._unknown(name, taken))
            nulls &= taken.keys()
            merged = {**self._defaults(given, taken), **given}
        applied = {
            name: self._checked(name, value, taken.get(name)) for name, value in merged.items() if name not in nulls
        }
        applied |= dict.fromkeys(sorted(nulls))
        replaced = check_tensors(applied, given, taken.get(TENSORS))
        applied = {name: value for name, value in applied.items() if name not in replaced}
        meant = {(taken[name].alias_of or name) if name in taken else name: value for name, value in applied.items()}
        meant |= replaced
        for parameter in taken.values():
            if parameter.required and parameter.name not in meant:
                raise ParameterError(parameter.name, "is required.")
        check_task(meant, tasks)
        if different := conflicting_names(applied, taken.values()):
            raise ParameterError(different[0], f"is another name of {different[1]}, which has a different value.")
        applied |= self._steps(given, taken)
        applied = resolve_classes(applied, taken.values())
        _check_strength(applied, taken)
        return applied

    def check_total(self, inputs: Mapping[str, object], n: int) -> None:
        """Raise ParameterError if the `n` images of a request have too many steps together."""
        steps = inputs.get(STEPS)
        most = max(MAX_STEPS, self.limits(Parameter(STEPS, ParameterKind.INTEGER))[1])
        if isinstance(steps, int) and n * steps > most:
            raise ParameterError("n", f"times {STEPS} must be at most {most:g}, not {n * steps}.")

    def limits(self, parameter: Parameter) -> Limits:
        """Return the lowest and highest value of a parameter, and the step if any; () if it is not a number."""
        own = self.ranges.get(parameter.name) or self.ranges.get(parameter.alias_of)
        builtin = default_limits(parameter.alias_of or parameter.name, parameter.kind)
        if parameter.name == _TEXT_LENGTH and self.max_tokens and builtin:
            default = parameter.default if isinstance(parameter.default, int) else 1
            builtin = (1, max(min(self.max_tokens, builtin[1]), default))
        limits = (own or builtin) if builtin else ()
        return (*limits, parameter.multiple_of) if len(limits) == 2 and parameter.multiple_of else limits

    def default(self, parameter: Parameter) -> Default:
        """Return the default of a parameter."""
        return self.defaults.get(parameter.name, parameter.default)

    def misspellings(self, taken: Collection[str], file: Path) -> list[str]:
        """Return a sentence for each default and range whose name is most likely a misspelt parameter. Pure.

        Serving ignores a default or range of a parameter that the model does not take, so none of these is fatal.

        Args:
            taken: Names of the parameters that the model takes.
            file: The file of this serving config, for the sentences.
        """
        known = {*taken, *KNOWN_KINDS, FPS, GUIDANCE_SCALE, TRUE_CFG_SCALE}
        return [
            f'The {section} in {file} have "{name}": did you mean "{meant}"?'
            for section, names in (("defaults", self.defaults), ("ranges", self.ranges))
            for name, meant in find_misspellings(names, known)
        ]

    def _defaults(self, given: Mapping[str, object], taken: Mapping[str, Parameter]) -> dict[str, Value]:
        """Return the defaults of parameters that are not given under any of their names."""
        meant = {taken[name].alias_of or name for name in given}
        return {
            name: value
            for name, value in self.defaults.items()
            if name in taken and (taken[name].alias_of or name) not in meant
        }

    def _steps(self, given: Mapping[str, object], taken: Mapping[str, Parameter]) -> dict[str, object]:
        """Return the number of steps that follows from a list with an entry for each step."""
        low, high = self.limits(taken.get(STEPS) or Parameter(STEPS, ParameterKind.INTEGER))[:2]
        counted: dict[str, object] = {}
        for name in _LISTS_OF_STEPS:
            count, asked = list_length(given.get(name)), given.get(STEPS)
            if count is None:
                continue
            if not low <= count <= high:
                raise ParameterError(name, f"must be {low:g} to {high:g} numbers, one for each step, not {count}.")
            if asked not in (None, count):
                raise ParameterError(name, f"must be {asked} numbers, as many as {STEPS}, not {count}.")
            if not taken or STEPS in taken:
                counted[STEPS] = count
        return counted

    def _checked(self, name: str, value: object, parameter: Parameter | None) -> object:
        if parameter is None:
            kind = KNOWN_KINDS.get(name) or guess_kind(value)
            if kind is None:
                raise ParameterError(name, "must be text, true or false, a number or a list of them, or an image.")
            parameter = Parameter(name, kind)
        check_count(name, value, parameter.every)
        return validate(name, value, parameter.kind, self.limits(parameter), many=parameter.many)

    def _unknown(self, name: str, taken: Collection[str]) -> str:
        close = difflib.get_close_matches(name, taken, n=1, cutoff=_ALIKE)
        hint = f"Did you mean {close[0]}?" if close else f"It takes {', '.join(sorted(taken))}."
        return f"is not a parameter of {self.name or 'this model'}. {hint}"


def _check_strength(applied: Mapping[str, object], taken: Mapping[str, Parameter]) -> None:
    """Raise ParameterError if the strength is so small that the request has no steps."""
    if "strength" not in taken or not applied.keys() & {"image", "video"}:
        return
    defaults = {name: parameter.default for name, parameter in taken.items()}
    strength, steps = ({**defaults, **applied}.get(name) for name in ("strength", STEPS))
    if isinstance(strength, (int, float)) and isinstance(steps, int) and int(steps * strength) < 1:
        needed = f"at least {math.ceil(1 / strength)} steps, or a larger strength" if strength > 0 else "more strength"
        raise ParameterError(
            STEPS, f"times strength must be at least 1, not {steps} times {strength:g}: give {needed}."
        )


def find_misspellings(names: Iterable[str], known: Collection[str]) -> list[tuple[str, str]]:
    """Find the names that are most likely known ones misspelt, with what they may mean. Pure."""
    found = []
    for name in names:
        close = [] if name in known else difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.75)
        if close:
            found.append((name, close[0]))
    return found


def load_serving_config(model: Path, task: str | tuple[str, ...] = "", title: str = "") -> ServingConfig:
    """Read the serving config of a model, or make one from its index.

    Args:
        model: The folder of the model.
        task: The task or tasks that replace those of the serving config; empty for those.
        title: The name of the model if the serving config has none; "" for that of its folder.

    Raises:
        ModelError: There is no such folder, or its serving config is wrong.
    """
    index = load_index(model)
    family = str(index["_class_name"]).removesuffix("Pipeline").removesuffix("Modular").lower()
    path = model / SERVING_CONFIG_NAME
    try:
        serving_config = msgspec.json.decode(path.read_bytes(), type=ServingConfig)
    except FileNotFoundError:
        return ServingConfig(name=title or model.resolve().name, family=family, task=task, max_tokens=max_tokens(model))
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"The serving config {path} cannot be read: {error}.") from error
    for name, limits in serving_config.ranges.items():
        if len(limits) not in (2, 3) or limits[0] > limits[1] or (len(limits) == 3 and limits[2] <= 0):
            raise ModelError(
                f"The serving config {path} gives {name} the range {list(limits)}, but a range is [lowest, highest] or"
                " [lowest, highest, step]."
            )
    try:
        serving_config.apply({})
    except ParameterError as error:
        raise ModelError(f"The serving config {path} forbids its own default: {error}") from error
    name = serving_config.name or title or model.resolve().name
    return msgspec.structs.replace(
        serving_config,
        name=name,
        family=serving_config.family or family,
        task=task or serving_config.task,
        max_tokens=serving_config.max_tokens or max_tokens(model),
    )


def max_tokens(model: Path) -> int:
    """Return the most tokens that a tokenizer of a model takes, from its configuration; 0 if unknown.

    Raises:
        ModelError: A configuration cannot be read.
    """
    longest = 0
    for path in model.glob("tokenizer*/tokenizer_config.json"):
        try:
            length = msgspec.json.decode(path.read_bytes(), type=_Tokenizer).model_max_length
        except (OSError, msgspec.DecodeError) as error:
            raise ModelError(f"{path} cannot be read: {error}.") from error
        if length is not None and 0 < length < _UNKNOWN_LENGTH:
            longest = max(longest, int(length))
    return longest


class _Tokenizer(msgspec.Struct):
    model_max_length: float | None = None


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
    if isinstance(index, dict) and _is_custom(index.get("_class_name")):
        module, name = index["_class_name"]
        index |= {"_class_name": name, "_module": str(model / f"{module}.py")}
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise ModelError(f"The index {path} does not say which pipeline it is for (`_class_name`).")
    return index


def _is_custom(name: object) -> bool:
    """Whether an index has a pipeline of its own: a list of a module in the model's folder, and a class."""
    return isinstance(name, list) and len(name) == 2 and all(str(part).isidentifier() for part in name)
