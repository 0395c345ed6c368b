"""Load components, and stubs for the components that a stage does not need."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
import transformers
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec
from transformers import PreTrainedModel

from triptych.engines.model_options import DEFAULTS, ModelOptions
from triptych.engines.stages import ModelError
from triptych.engines.weights.custom_code import custom_class, custom_file
from triptych.engines.weights.files import (
    WeightFiles,
    WeightFormat,
    component_files,
    component_folder,
    read_ahead_files,
)
from triptych.engines.weights.placement import Placement
from triptych.engines.weights.quantization import method_problem, quantization_method
from triptych.engines.weights.read_ahead import read_ahead
from triptych.engines.weights.single_files import read_single_file
from triptych.engines.weights.stubs import Stub, is_multi_model, make_stub

_LIBRARIES: Final = {"diffusers": diffusers, "transformers": transformers}


def load_component(name: str, spec: Any, folder: Path, placement: Placement) -> Any:
    """Load a component for inference.

    Args:
        name: The name of the component in the pipeline.
        spec: Its `ComponentSpec`.
        folder: Its folder.
        placement: How its weights are held.

    Raises:
        ModelError: The component is broken, weights are missing, or they cannot be held in this way.
    """
    files = component_files(name, folder, placement.options) if _has_weights(spec.type_hint) else WeightFiles()
    folder = component_folder(name, folder, placement.options)
    place = folder if files.form is WeightFormat.FOLDER else files.files[0]
    if files.problem:
        raise ModelError(f"The {name} in {place} {files.problem}.")
    if files.form is WeightFormat.FOLDER and files.files and (problem := _quantization_problem(folder, placement)):
        raise ModelError(f"The {name} in {place} {problem}.")
    if files.note:
        placement.notes[name] = files.note
    try:
        component, complete = _read(name, spec, folder, files, placement.dtype)
    except ModelError:
        raise
    except Exception as error:  # two libraries may raise anything for broken files; report it as one sentence
        raise ModelError(f"The {name} in {place} cannot be loaded: {error}") from error
    if not complete:
        raise ModelError(f"The {name} in {place} cannot be loaded: its files lack some of the weights.")
    placement.progress.complete(files.files)
    if not isinstance(component, torch.nn.Module):
        return component
    return placement.prepare(name, component)


def _quantization_problem(folder: Path, placement: Placement) -> str:
    try:
        method = quantization_method(folder)
    except (OSError, ValueError):  # reported when the configuration is read
        return ""
    return method_problem(method, placement.device.type, installed=lambda name: find_spec(name) is not None)


def load_stub(
    name: str,
    spec: Any,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    options: ModelOptions = DEFAULTS,
) -> object | None:
    """Make the stub of a component; see `stubs.make_stub`.

    Raises:
        ModelError: Its configuration is broken.
    """
    try:
        return make_stub(name, spec.type_hint, component_folder(name, folder, options), dtype, device, options)
    except Exception as error:  # two libraries may raise anything; report it as one sentence
        raise ModelError(f"The configuration of {name} in {folder} cannot be read: {error}") from error


def _has_weights(kind: object) -> bool:
    # diffusers makes a component without a type from the class name in its configuration.
    return kind is None or (isinstance(kind, type) and issubclass(kind, torch.nn.Module))


def _read(name: str, spec: Any, folder: Path, files: WeightFiles, dtype: torch.dtype) -> tuple[Any, bool]:
    """Read a component; returns it and whether its files have all of its weights, which libraries do not require."""
    kind = spec.type_hint
    if files.form is not WeightFormat.FOLDER:
        component = read_single_file(name, kind, files.files[0], folder, dtype)
        return component, not any(parameter.is_meta for parameter in component.parameters())
    # Weights in the older format are pickles, which can run code when they are read.
    options = {
        "dtype": dtype,
        "use_safetensors": True,
        "local_files_only": True,
        "variant": files.variant or None,
    }
    if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
        loader: Any = kind
        component, report = loader.from_pretrained(str(folder), output_loading_info=True, **options)
        return component, not report["missing_keys"]
    place = {"pretrained_model_name_or_path": str(folder), "subfolder": ""}
    if not _has_weights(kind):
        return spec.load(**place, local_files_only=True), True
    several = is_multi_model(kind)
    component = kind.from_pretrained(str(folder), **options) if several else spec.load(**place, **options)
    return component, not any(parameter.is_meta for parameter in component.parameters())


def missing_folder(model: Path, folder: Path, name: str) -> str:
    """Return the message for a component that has no folder."""
    return (
        f"The model {model} is incomplete: there is no folder {folder} for its {name}. For components that"
        " other roles load, the configuration is enough."
    )


class ClassicLoader:
    """Loads the pipeline of a classic model.

    Args:
        model: The folder of the model.
        cls: The class of its pipeline.
        index: The index of the model.
        entries: The library and class of each component by name.
        options: The options of the topology.
    """

    def __init__(
        self,
        model: Path,
        cls: Any,
        index: Mapping[str, object],
        entries: Mapping[str, tuple[str, str]],
        options: ModelOptions = DEFAULTS,
    ) -> None:
        self._model = model
        self._cls = cls
        self._index = index
        self._specs = {
            name: ComponentSpec(
                name=name,
                type_hint=_component_class(model / name, *entry, options),
                pretrained_model_name_or_path=str(model),
                subfolder=name,
            )
            for name, entry in entries.items()
        }

    def pipeline(self, wanted: Collection[str], placement: Placement) -> tuple[Any, dict[str, Stub]]:
        """Make a pipeline with some components, and stubs for the others.

        Args:
            wanted: The names of the components to load.
            placement: How their weights are held.

        Returns:
            The pipeline, and stubs for all of its models by name, loaded or not.

        Raises:
            ModelError: A component is missing or broken.
        """
        parameters = list(inspect.signature(self._cls.__init__).parameters.values())[1:]
        for parameter in parameters:
            if parameter.default is parameter.empty and parameter.name not in self._index:
                raise ModelError(
                    f"The index of {self._model} has no {parameter.name}, which {self._cls.__name__} needs."
                )
        stubs = {
            name: load_stub(name, spec, self._folder(name), placement.dtype, placement.device, placement.options)
            for name, spec in self._specs.items()
        }
        given: dict[str, Any] = {
            parameter.name: self._setting(parameter.name) for parameter in parameters if parameter.name in self._index
        }
        given.update(stubs)
        files = (file for name in wanted for file in read_ahead_files(name, self._folder(name), placement.options))
        read_ahead(files, placement.progress)
        for name in wanted:
            given[name] = load_component(name, self._specs[name], self._folder(name), placement)
        pipeline = self._cls(**given)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline, {name: made for name, made in stubs.items() if isinstance(made, Stub)}

    def _setting(self, name: str) -> object:
        value = self._index[name]
        return None if value == [None, None] else value

    def _folder(self, name: str) -> Path:
        folder = self._model / name
        if not folder.is_dir():
            raise ModelError(missing_folder(self._model, folder, name))
        return folder


def _component_class(folder: Path, library: str, class_name: str, options: ModelOptions) -> type:
    if file := custom_file(folder, library):
        return custom_class(file, class_name, options)
    # Any other library must be a folder of diffusers' pipelines: an index cannot make us import anything else.
    module = _LIBRARIES.get(library) or getattr(diffusers.pipelines, library, None)
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        raise ModelError(f"The {folder.name} is a {class_name} of {library}, which is not installed.")
    return found
