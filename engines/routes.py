"""Choose how the pipeline of a model is cut: in blocks, at its text encoder and VAE, or not at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import diffusers

from triptych.engines.anatomy import anatomy
from triptych.engines.card import load_card, load_index
from triptych.engines.custom_code import has_custom_code
from triptych.engines.loading import geometry_problem
from triptych.engines.media import foreign, medium_of, results_of
from triptych.engines.options import DEFAULTS, ModelOptions
from triptych.engines.panels import ModelError, Panel
from triptych.engines.parameters import Medium, Task
from triptych.engines.split import NoWorkflowError, load_split, modular_class, pipeline_class
from triptych.engines.tasks import asked, class_task_problem, class_tasks, classic_class
from triptych.engines.weight_files import check_components

__all__ = ["Route", "check_panels", "classic_class", "describe", "route_for", "route_of", "tasks_of"]


class Route(StrEnum):
    """A way to serve a pipeline, the best first."""

    MODULAR = "modular"
    """diffusers has the pipeline in blocks, which are cut by one rule."""
    CLASSIC = "classic"
    """The pipeline is one function, which each panel runs until it needs what another one has."""
    MONOLITHIC = "monolithic"
    """The pipeline runs as a whole, in one process."""


def route_of(index: Mapping[str, object]) -> Route:
    """Choose the route for the index of a model.

    Raises:
        ModelError: diffusers has no such pipeline.
    """
    if modular_class(index) is not None:
        return Route.MODULAR
    return _without_blocks(index)


def route_for(model: Path, options: ModelOptions = DEFAULTS) -> Route:
    """Choose the route for a model.

    Args:
        model: Its folder.
        options: How it is cut.

    Raises:
        ModelError: It is no model, or diffusers has no such pipeline, or none for the route or the task.
    """
    index = load_index(model)
    check_components(index, options)
    if options.route == Route.MODULAR:
        pipeline_class(index, model)
        return Route.MODULAR
    uncut = options.route == Route.CLASSIC or has_custom_code(index, model)
    if not uncut and modular_class(index) is not None:
        named = getattr(diffusers, str(index["_class_name"]), None)
        has_class = isinstance(named, type) and issubclass(named, diffusers.DiffusionPipeline)
        try:
            # A few pipelines know a VAE that their blocks do not: without blocks they make the right size.
            if not has_class or not geometry_problem(load_split(model, options)):
                return Route.MODULAR
        except NoWorkflowError as error:
            # What the blocks do not do, the class may: they have no inpainting for most families.
            if not has_class or not _does(classic_class(index), asked(load_card(model, options.task).task)):
                raise ModelError(str(error)) from error
    cls = classic_class(index, options)
    # A card is of the folder; that of another class of the same family may say anything else.
    if problem := class_task_problem(cls, asked(options.task), _medium(cls)):
        raise ModelError(problem)
    return _without_blocks(index, options)


def tasks_of(model: Path, options: ModelOptions = DEFAULTS) -> tuple[Task, ...]:
    """Say what requests to a model may be for.

    Raises:
        ModelError: As `route_for`, or its pipeline cannot be cut.
    """
    if route_for(model, options) is Route.MODULAR:
        return load_split(model, options).tasks
    cls = classic_class(load_index(model), options)
    return class_tasks(cls, _medium(cls))


def where(route: Route, panels: Collection[Panel]) -> Route:
    """Choose the route in a process that has some panels: with all of them there is no need to cut a function."""
    return Route.MONOLITHIC if route is Route.CLASSIC and set(panels) == set(Panel) else route


def check_panels(route: Route, index: Mapping[str, object], model: Path, panels: Collection[Panel]) -> None:
    """Refuse to run a pipeline in parts that it does not have.

    Raises:
        ModelError: The route has no parts, and not all panels are in one process.
    """
    if route is Route.MONOLITHIC and set(panels) != set(Panel):
        raise ModelError(
            f"The model {model} is for {index['_class_name']}, which cannot be run in parts: give the topology one"
            ' role of kind="monolithic" in the place of encoders, denoisers and decoders.'
        )


def describe(model: Path, options: ModelOptions, *, in_parts: bool) -> tuple[str, str]:
    """Say how a model would be served, without loading it.

    Args:
        model: Its folder.
        options: How it is cut.
        in_parts: Whether panels have processes of their own.

    Returns:
        A sentence; and another one, of why the model cannot be served, or "".
    """
    try:
        index = load_index(model)
        panels = [Panel.ENCODER] if in_parts else list(Panel)
        route = where(route_for(model, options), panels)
        tasks = " or ".join(f"{task.name} ({', '.join(task.requires)})" for task in tasks_of(model, options))
        check_panels(route, index, model, panels)
    except ModelError as error:
        return "", str(error)
    return f"{index['_class_name']}, by the {route} route: {tasks}", ""


def _does(cls: Any, named: tuple[str, ...]) -> bool:
    return not class_task_problem(cls, named, _medium(cls))


def _medium(cls: Any) -> Medium:
    return medium_of(results_of(cls.__call__))


def _without_blocks(index: Mapping[str, object], options: ModelOptions = DEFAULTS) -> Route:
    cls = classic_class(index, options)
    if made := foreign(results_of(cls.__call__)):
        raise ModelError(
            f"{cls.__name__} makes {made}, which are no image, video or sound: it cannot be served by itself."
        )
    return Route.CLASSIC if anatomy(cls, index).can_be_cut else Route.MONOLITHIC
