"""Choose how the pipeline of a model is cut: in blocks, at its text encoder and VAE, or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import diffusers

from engines.anatomy import anatomy
from engines.panels import ModelError
from engines.split import modular_class


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
    return Route.CLASSIC if anatomy(classic_class(index), index).can_be_cut else Route.MONOLITHIC


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
