"""Classes that a request may choose for a component, and the options that they take. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from triptych.engines.parameters.schema import KIND_DESCRIPTIONS, Option, Parameter, ParameterKind
from triptych.engines.parameters.validation import ParameterError, default_limits, options_in, validate

SHORT_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    "euler": ("EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    "euler_a": ("EulerAncestralDiscreteScheduler",),
    "heun": ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "lms": ("LMSDiscreteScheduler",),
    "dpm++": ("DPMSolverMultistepScheduler",),
    "dpm++_sde": ("DPMSolverSDEScheduler",),
    "unipc": ("UniPCMultistepScheduler",),
    "deis": ("DEISMultistepScheduler",),
    "cfg": ("ClassifierFreeGuidance",),
    "cfg_zero_star": ("ClassifierFreeZeroStarGuidance",),
    "apg": ("AdaptiveProjectedGuidance",),
    "slg": ("SkipLayerGuidance",),
    "pag": ("PerturbedAttentionGuidance",),
    "seg": ("SmoothedEnergyGuidance",),
    "tcfg": ("TangentialClassifierFreeGuidance",),
}
"""Short names of classes; a name stands for the first of its classes that the model can use."""
_ENDINGS: Final = ("scheduler", "guidance")
_MOST_OPTIONS: Final = 64


def find_class(text: str, names: Collection[str]) -> str | None:
    """Return the class name that a text stands for, or None.

    Args:
        text: The name of a class in any case, with or without "Scheduler" or "Guidance" at its end; or a short name.
        names: The names of the classes to choose from.
    """
    wanted = _plain(text)
    for name in names:
        if wanted in (_plain(name), *(_plain(name).removesuffix(ending) for ending in _ENDINGS)):
            return name
    return next((name for name in SHORT_NAMES.get(text.lower().replace("-", "_"), ()) if name in names), None)


def resolve_classes(inputs: Mapping[str, object], parameters: Iterable[Parameter]) -> dict[str, object]:
    """Replace short class names with full ones, and check the options of each class.

    Args:
        inputs: The inputs by public name, of the right kinds.
        parameters: The parameters of the pipeline.

    Raises:
        ParameterError: A class is unknown, has no such option, or does not take the value of an option.
    """
    known = {parameter.name: parameter for parameter in parameters}
    made = dict(inputs)
    for name in sorted({parameter.chosen_by for parameter in known.values()} & known.keys()):
        wanted = made.get(name)
        if isinstance(wanted, str):
            made[name] = _chosen(known[name], wanted)
    for parameter in known.values():
        options = options_in(made.get(parameter.name))
        if options is None or parameter.kind is not ParameterKind.OPTIONS:
            continue
        chooser = known.get(parameter.chosen_by)
        cls = made.get(parameter.chosen_by) or (chooser.default if chooser else None)
        check_options(parameter, None if cls is None else str(cls), options)
    return made


def check_options(parameter: Parameter, class_name: str | None, options: Mapping[str, object]) -> None:
    """Check the names and values of options.

    Args:
        parameter: The parameter, of kind OPTIONS.
        class_name: The class that takes the options; None if there is only one.
        options: The options by name.

    Raises:
        ParameterError: The class has no such option, or does not take its value.
    """
    found = next((each for each in parameter.alternatives if class_name in (None, each.name)), None)
    if found is None:
        what = "the VAE of this model" if class_name is None else class_name
        raise ParameterError(parameter.name, f"cannot be given: {what} takes no options.")
    if len(options) > _MOST_OPTIONS:
        raise ParameterError(parameter.name, f"must be at most {_MOST_OPTIONS} options.")
    taken = {option.name: option for option in found.options}
    for name, value in options.items():
        if name not in taken:
            close = difflib.get_close_matches(name, taken, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(taken) or 'none'}."
            raise ParameterError(parameter.name, f"has {name[:64]}, which is not an option of {found.name}: {hint}")
        _check_option(parameter.name, taken[name], value)


def _check_option(param: str, option: Option, value: object) -> None:
    if value is None:
        if option.nullable:
            return
        raise ParameterError(param, f"has {option.name}, which must not be null.")
    if option.choices and (not isinstance(value, str) or value not in option.choices):
        raise ParameterError(param, f"has {option.name}, which must be one of {', '.join(option.choices)}.")
    problems = []
    for kind in option.kinds:
        try:
            validate(option.name, value, kind, default_limits(option.name, kind))
        except ParameterError as error:
            # With several kinds, prefer the error about a value of the right kind: it says the most.
            problems.append((error.message == f"must be {KIND_DESCRIPTIONS[kind]}.", error.message))
        else:
            return
    words = " or ".join(KIND_DESCRIPTIONS[kind] for kind in option.kinds)
    wrong_kind, message = min(problems)
    raise ParameterError(param, f"has {option.name}, which {f'must be {words}.' if wrong_kind else message}")


def _chosen(parameter: Parameter, value: str) -> str:
    name = find_class(value, parameter.choices)
    if name is None:
        raise ParameterError(
            parameter.name, f"must be one of {', '.join(parameter.choices)}: there is no {value[:64]!r}."
        )
    return name


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").replace(" ", "")
