"""Choose how the pipeline of a model is cut: in blocks, at its text encoder and VAE, or not at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import diffusers

from engines.anatomy import anatomy
from engines.card import load_index
from engines.loading import geometry_problem
from engines.media import foreign, results_of
from engines.options import DEFAULTS, ModelOptions
from engines.panels import ModelError, Panel
from engines.split import load_split, modular_class, pipeline_class
from engines.weight_files import check_components


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
        ModelError: It is no model, or diffusers has no such pipeline, or one that has no tasks to choose of.
    """
    index = load_index(model)
    check_components(index, options)
    if options.route == Route.MODULAR:
        pipeline_class(index, model)
    route = _without_blocks(index) if options.route == Route.CLASSIC else route_of(index)
    named = getattr(diffusers, str(index["_class_name"]), None)
    has_both = route is Route.MODULAR and issubclass(named or object, diffusers.DiffusionPipeline)
    # A few pipelines know a VAE that their blocks do not: without blocks they make the right size.
    if has_both and not options.route and geometry_problem(load_split(model, options)):
        route = _without_blocks(index)
    if options.task and route is not Route.MODULAR:
        raise ModelError(f"{index['_class_name']} has no tasks to choose of: leave out [model] task.")
    return route


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
        if route is Route.MODULAR:
            load_split(model, options)
        check_panels(route, index, model, panels)
    except ModelError as error:
        return "", str(error)
    return f"{index['_class_name']}, by the {route} route", ""


def classic_class(index: Mapping[str, object]) -> Any:
    """Find the pipeline that an index names.

    Raises:
        ModelError: There is none, or it needs a package that is not installed.
    """
    name = str(index["_class_name"])
    try:
        # One of them ends the process where a package that it needs is absent.
        found = getattr(diffusers, name, None)
    except (ImportError, RuntimeError, SystemExit) as error:
        raise ModelError(f"The pipeline {name} cannot be imported: {error}") from error
    if not isinstance(found, type) or not issubclass(found, diffusers.DiffusionPipeline):
        needs = ", ".join(getattr(found, "_backends", ()))
        missing = f"needs {needs}" if needs else f"is not one of diffusers {diffusers.__version__}"
        raise ModelError(f"The model is for {name}, which {missing}.")
    return found


def _without_blocks(index: Mapping[str, object]) -> Route:
    cls = classic_class(index)
    if made := foreign(results_of(cls.__call__)):
        raise ModelError(
            f"{cls.__name__} makes {made}, which are no image, video or sound: it cannot be served by itself."
        )
    return Route.CLASSIC if anatomy(cls, index).can_be_cut else Route.MONOLITHIC
