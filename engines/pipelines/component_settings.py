"""Settings of the components of a pipeline: its scheduler, its guiders, and tiling and slicing of its VAE.

A request changes its private copy of the pipeline (`engines.pipelines.guidance.request_copy`); a topology changes the
shared pipeline when it is loaded. In both cases a component is replaced by
`CLASS.from_config(COMPONENT.config, **OPTIONS)`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, Literal, get_args, get_origin

import torch
from diffusers import guiders
from diffusers.guiders import BaseGuidance
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from triptych.engines.model_options import ComponentOptions, ModelOptions
from triptych.engines.parameters.aliases import GUIDANCE_SCALE
from triptych.engines.parameters.alternatives import check_options, find_class
from triptych.engines.parameters.declarations import kinds_of_type
from triptych.engines.parameters.schema import Alternative, Option, Parameter, ParameterKind
from triptych.engines.parameters.validation import ParameterError
from triptych.engines.stages import InputError, ModelError
from triptych.engines.weights.stubs import Stub
from triptych.engines.weights.textual_inversion import load_textual_inversions

SCHEDULER: Final = "scheduler"
SCHEDULER_OPTIONS: Final = "scheduler_options"
GUIDER: Final = "guider"
GUIDER_OPTIONS: Final = "guider_options"
GUIDANCE_RESCALE: Final = "guidance_rescale"
GUIDANCE_SCALE_2: Final = "guidance_scale_2"
SECOND_GUIDER: Final = "guider_2"
VAE: Final = "vae"
VAE_TILING: Final = "vae_tiling"
VAE_TILING_OPTIONS: Final = "vae_tiling_options"
VAE_SLICING: Final = "vae_slicing"

OF_GUIDERS: Final = frozenset({GUIDER, GUIDER_OPTIONS, GUIDANCE_SCALE, GUIDANCE_SCALE_2, GUIDANCE_RESCALE})
OF_SCHEDULER: Final = frozenset({SCHEDULER, SCHEDULER_OPTIONS})
OF_VAE: Final = frozenset({VAE_TILING, VAE_TILING_OPTIONS, VAE_SLICING})
_ONE_FAMILY: Final = frozenset({"LTX2Guidance"})
"""Guiders for outputs that only the transformer of one family has; no other guider can replace them."""
_LAYER_BY_LAYER: Final = frozenset({"skip_layer_guidance_layers", "auto_guidance_layers", "seg_guidance_layers"})
_OWN_PARAMETERS: Final = frozenset({GUIDANCE_SCALE, GUIDANCE_RESCALE})
"""Options of guiders that are parameters of their own."""


def setting_parameters(pipeline: Any) -> tuple[Parameter, ...]:
    """Return the parameters with which a request sets components of a pipeline.

    Args:
        pipeline: A pipeline of diffusers, with components or stubs.
    """
    return (*_of_scheduler(pipeline), *_of_guiders(pipeline), *_of_vae(pipeline))


def configure(pipeline: Any, options: ModelOptions) -> None:
    """Apply the settings of a topology to a pipeline that has just been loaded.

    Raises:
        ModelError: The pipeline has no such component, or the component does not take the setting.
    """
    load_textual_inversions(pipeline, options.embeddings)
    try:
        if options.scheduler != ComponentOptions():
            _require(isinstance(getattr(pipeline, SCHEDULER, None), SchedulerMixin), SCHEDULER, pipeline)
            name, values = _checked(options.scheduler, pipeline, SCHEDULER, SCHEDULER_OPTIONS)
            setattr(pipeline, SCHEDULER, rebuilt(pipeline.scheduler, name, values))
        if options.guider != ComponentOptions():
            _require(any(guiders_of(pipeline)), GUIDER, pipeline)
            name, values = _checked(options.guider, pipeline, GUIDER, GUIDER_OPTIONS, also=_OWN_PARAMETERS)
            for place, guider in list(guiders_of(pipeline)):
                setattr(pipeline, place, rebuilt(guider, name, values))
        _configure_vae(pipeline, options)
    except (InputError, ParameterError) as error:
        raise ModelError(f"A setting of the topology's [model] cannot be applied: {error}") from error


def rebuilt(component: Any, class_name: str | None, options: Mapping[str, object]) -> Any:
    """Make a new scheduler or guider from one with its configuration.

    Args:
        component: The component of the pipeline.
        class_name: The class of the new one; None for the same class.
        options: The values that replace those of the configuration.

    Raises:
        InputError: The class refuses the options.
    """
    cls = type(component)
    if class_name is not None and class_name != cls.__name__:
        cls = next(each for each in alternatives_of(component) if each.__name__ == class_name)
    values = {name: _as_taken(name, value) for name, value in options.items()}
    if not values and cls is type(component):
        return cls.from_config(component.config)
    try:
        return cls.from_config(component.config, **values)
    except Exception as error:  # a class may raise anything for bad options; report it as one sentence
        raise InputError(f"{cls.__name__} cannot be made of these options: {error}") from error


def alternatives_of(component: Any) -> list[Any]:
    """Return the classes that can replace a scheduler or guider, with its own, sorted by name."""
    if isinstance(component, SchedulerMixin):
        found = [cls for cls in component.compatibles if not hasattr(cls, "_backends")]
    elif type(component).__name__ in _ONE_FAMILY:
        found = []
    else:
        found = [cls for cls in vars(guiders).values() if _is_general(cls)]
    return sorted({*found, type(component)}, key=lambda cls: cls.__name__)


def guiders_of(pipeline: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names and guiders of a pipeline; the first is for the first steps, or for images rather than sound."""
    return ((name, part) for name, part in vars(pipeline).items() if isinstance(part, BaseGuidance))


def make_scheduler(scheduler: Any, inputs: Mapping[str, object]) -> Any:
    """Make the scheduler of a request from its inputs."""
    return rebuilt(scheduler, _text(inputs.get(SCHEDULER)), _options(inputs.get(SCHEDULER_OPTIONS)))


def make_guider(guider: Any, inputs: Mapping[str, object]) -> Any:
    """Make the guider of a request from its inputs, without its scale."""
    options = _options(inputs.get(GUIDER_OPTIONS))
    made = rebuilt(guider, _text(inputs.get(GUIDER)), options)
    rescale = inputs.get(GUIDANCE_RESCALE)
    if rescale is None or GUIDANCE_RESCALE not in made.config:
        return made
    return made.new(**{GUIDANCE_RESCALE: rescale})


def make_vae(vae: Any, inputs: Mapping[str, object]) -> Any:
    """Return the VAE of a request: a copy that shares the weights, or the VAE itself if the inputs do not set it."""
    tiling, slicing = inputs.get(VAE_TILING), inputs.get(VAE_SLICING)
    options = _options(inputs.get(VAE_TILING_OPTIONS))
    if isinstance(vae, Stub) or not isinstance(vae, torch.nn.Module) or (tiling, slicing, options) == (None, None, {}):
        return vae
    mine: Any = copy.copy(vae)
    if tiling is not None or options:
        _switch_tiling(mine, tiling is not False, options)
    if slicing is not None:
        mine.enable_slicing() if slicing else mine.disable_slicing()
    return mine


def remove_guider_hooks(pipeline: Any) -> None:
    """Remove the hooks that a guider has added to the models of a pipeline for a forward that has failed."""
    models = [part for part in vars(pipeline).values() if isinstance(part, torch.nn.Module)]
    # The hooks are on blocks; the model has a registry of its own only after a forward that has not failed.
    modules = [model for model in models if any(hasattr(part, "_diffusers_hook") for part in model.modules())]
    for _, guider in guiders_of(pipeline):
        for module in modules:
            guider.cleanup_models(module)


def _of_scheduler(pipeline: Any) -> Iterator[Parameter]:
    scheduler = getattr(pipeline, SCHEDULER, None)
    if isinstance(scheduler, SchedulerMixin):
        yield from _choice(SCHEDULER, SCHEDULER_OPTIONS, scheduler, "scheduler", frozenset())


def _of_guiders(pipeline: Any) -> Iterator[Parameter]:
    found = dict(guiders_of(pipeline))
    if not found:
        return
    first = next(iter(found.values()))
    yield from _choice(GUIDER, GUIDER_OPTIONS, first, "guider", _OWN_PARAMETERS)
    text = (
        "How far the guided prediction is rescaled to the standard deviation of the conditional one, if the guider can."
    )
    default = first.config.get(GUIDANCE_RESCALE)
    yield Parameter(GUIDANCE_RESCALE, ParameterKind.NUMBER, default, description=text)
    if SECOND_GUIDER in found:
        text = f"The scale of the second guider, for the later steps; by default {GUIDANCE_SCALE}."
        yield Parameter(GUIDANCE_SCALE_2, ParameterKind.NUMBER, description=text)


def _of_vae(pipeline: Any) -> Iterator[Parameter]:
    vae: Any = getattr(pipeline, VAE, None)
    if _can(vae, "use_tiling"):
        text = "Whether the VAE computes in tiles, which takes less memory and changes the image slightly."
        yield Parameter(VAE_TILING, ParameterKind.BOOLEAN, bool(vae.use_tiling), description=text)
        if options := _options_of(vae.enable_tiling, without=frozenset({"use_tiling"})):
            name = type(getattr(vae, "_component", vae)).__name__
            text = "Sizes of the tiles and of their overlap; turns tiling on."
            yield Parameter(
                VAE_TILING_OPTIONS, ParameterKind.OPTIONS, description=text, alternatives=(Alternative(name, options),)
            )
    if _can(vae, "use_slicing"):
        text = "Whether the VAE computes one image of a batch at a time."
        yield Parameter(VAE_SLICING, ParameterKind.BOOLEAN, bool(vae.use_slicing), description=text)


def _choice(name: str, options: str, component: Any, word: str, without: frozenset[str]) -> Iterator[Parameter]:
    classes = alternatives_of(component)
    found = tuple(Alternative(cls.__name__, _options_of(cls.__init__, without=without)) for cls in classes)
    choices = tuple(each.name for each in found)
    served = type(component).__name__
    yield Parameter(name, ParameterKind.TEXT, served, description=f"The class of the {word}.", choices=choices)
    text = f"Options of the {word} that differ from the model's."
    yield Parameter(options, ParameterKind.OPTIONS, description=text, chosen_by=name, alternatives=found)


def _options_of(function: Callable[..., Any], without: Iterable[str]) -> tuple[Option, ...]:
    """Return the options of a class or function that JSON can express, sorted by name."""
    try:
        declared = inspect.signature(function, eval_str=True).parameters
    except (NameError, TypeError):
        declared = inspect.signature(function).parameters
    found = (_option(item) for name, item in declared.items() if name not in {"self", *without})
    return tuple(sorted((option for option in found if option), key=lambda option: option.name))


def _option(item: inspect.Parameter) -> Option | None:
    hint, default = item.annotation, item.default
    kinds = kinds_of_type(hint)
    if kinds == {ParameterKind.BOOLEAN} and default is None:
        # A switch has a default; these are numbers whose annotation is wrong.
        kinds = {ParameterKind.NUMBER}
    if not kinds or kinds & {ParameterKind.IMAGE, ParameterKind.IMAGE_LIST}:
        return None
    choices = tuple(get_args(hint)) if get_origin(hint) is Literal else ()
    return Option(item.name, tuple(sorted(kinds)), choices, default is None or type(None) in get_args(hint))


def _as_taken(name: str, value: object) -> object:
    items = list(value) if isinstance(value, tuple) else value
    if not name.endswith("_layers") or not isinstance(items, (int, list)):
        return items
    layers = items if isinstance(items, list) else [items]
    # These guiders document an index but make a `LayerSkipConfig` of it, which takes a list of indices.
    return [[layer] for layer in layers] if name in _LAYER_BY_LAYER else layers


def _is_general(cls: object) -> bool:
    is_guider = isinstance(cls, type) and issubclass(cls, BaseGuidance) and cls is not BaseGuidance
    return is_guider and cls.__name__ not in _ONE_FAMILY  # type: ignore[attr-defined]


def _is_loaded(vae: Any) -> bool:
    return isinstance(vae, torch.nn.Module) and not isinstance(vae, Stub)


def _can(vae: Any, attribute: str) -> bool:
    # Look for the switch: VAEs that cannot do it have the method, too, and it raises.
    return vae is not None and isinstance(getattr(vae, attribute, None), bool)


def _switch_tiling(vae: Any, on: bool, options: Mapping[str, object]) -> None:
    if on:
        vae.enable_tiling(**options)
    else:
        vae.disable_tiling()


def _configure_vae(pipeline: Any, options: ModelOptions) -> None:
    vae: Any = getattr(pipeline, VAE, None)
    if options.vae_tiling or options.vae_tiling_options:
        _require(_can(vae, "use_tiling"), VAE_TILING, pipeline)
        known = next((each for each in _of_vae(pipeline) if each.name == VAE_TILING_OPTIONS), None)
        sizes = dict(options.vae_tiling_options)
        if sizes:
            check_options(known or Parameter(VAE_TILING_OPTIONS, ParameterKind.OPTIONS), None, sizes)
        if _is_loaded(vae):
            _switch_tiling(vae, True, sizes)
    if options.vae_slicing:
        _require(_can(vae, "use_slicing"), VAE_SLICING, pipeline)
        if _is_loaded(vae):
            vae.enable_slicing()


def _checked(
    wanted: ComponentOptions, pipeline: Any, name: str, options: str, also: Iterable[str] = ()
) -> tuple[str | None, dict[str, object]]:
    """Return the class and options that a topology has for a component; raises ParameterError."""
    known = {parameter.name: parameter for parameter in setting_parameters(pipeline)}
    chosen = find_class(wanted.class_name, known[name].choices) if wanted.class_name else str(known[name].default)
    if chosen is None:
        raise ParameterError(
            name, f"must be one of {', '.join(known[name].choices)}: there is no {wanted.class_name!r}."
        )
    values: dict[str, object] = dict(wanted.options)
    check_options(known[options], chosen, {key: value for key, value in values.items() if key not in also})
    return chosen, values


def _require(there: bool, name: str, pipeline: Any) -> None:
    if not there:
        raise ParameterError(name, f"cannot be set: {type(pipeline).__name__} has no such component.")


def _options(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, Mapping) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
