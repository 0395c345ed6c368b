"""Code in a model's folder: pipelines and components of its own. It is run only if the topology allows it."""

from __future__ import annotations

import hashlib
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Final

import diffusers

from triptych.engines.model_options import ModelOptions
from triptych.engines.stages import ModelError

MODULE: Final = "_module"
"""The key of an index with the file of its pipeline, if the pipeline is in the model's folder."""


def custom_file(folder: Path, module: str) -> Path | None:
    """Return the file of a module in a model's folder; None if there is none or a library has the name."""
    known = module in ("diffusers", "transformers") or hasattr(diffusers.pipelines, module)
    file = folder / f"{module}.py"
    return file if module.isidentifier() and not known and file.is_file() else None


def has_custom_code(index: Mapping[str, object], model: Path) -> bool:
    """Whether the pipeline of a model or one of its components is code in the model's folder."""
    if MODULE in index:
        return True
    entries = ((name, entry) for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2)
    return any(isinstance(entry[0], str) and custom_file(model / name, entry[0]) for name, entry in entries)


def custom_class(file: Path, name: str, options: ModelOptions) -> type:
    """Import a class from a file in a model's folder.

    Args:
        file: The module; it may import others of its folder relatively.
        name: The name of the class.
        options: The options of the topology.

    Raises:
        ModelError: The topology does not allow this code, or it cannot be imported.
    """
    if not options.trust_remote_code:
        raise ModelError(
            f"{name} is code that comes with the model ({file}). It is not run unless [model] trust_remote_code = true,"
            " and may then do all that you may: read it first."
        )
    # Use a package for each folder, since two models may both have a `pipeline.py`.
    package = f"model_code_{hashlib.sha256(str(file.parent).encode()).hexdigest()[:16]}"
    if package not in sys.modules:
        made = ModuleType(package)
        made.__path__ = [str(file.parent)]
        sys.modules[package] = made
    try:
        found = getattr(importlib.import_module(f"{package}.{file.stem}"), name, None)
    except Exception as error:  # foreign code may raise anything; report it as one sentence
        raise ModelError(f"The code that comes with the model ({file}) cannot be imported: {error}") from error
    if not isinstance(found, type):
        raise ModelError(f"The code that comes with the model ({file}) has no class {name}.")
    return found
