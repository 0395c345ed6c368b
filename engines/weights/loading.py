"""Load the components that a stage needs, and stubs of those that it does not."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from triptych.engines.partition.blocks import ModularPartition
from triptych.engines.partition.options import DEFAULTS, ModelOptions
from triptych.engines.partition.stages import ModelError
from triptych.engines.partition.stubs import is_multi_model, make_stub
from triptych.engines.weights.files import WeightFiles, WeightFormat, component_files, component_folder, files_ahead
from triptych.engines.weights.placement import Placement
from triptych.engines.weights.quantization import problem_with, quantized_as
from triptych.engines.weights.read_ahead import read_ahead
from triptych.engines.weights.single_files import read_single_file


def load_components(pipeline: Any, partition: ModularPartition, placement: Placement) -> frozenset[str]:
    """Load the weights and tokenizers that a pipeline's blocks name.

    Returns:
        The names of what was loaded.

    Raises:
        ModelError: One is missing or broken. (The pipeline's own way to load would warn and go on without it.)
    """
    names = [name for name in pipeline.pretrained_component_names if not _is_null(partition, name)]
    specs = {name: pipeline.get_component_spec(name) for name in names}
    model_folders = {name: _folder(partition, name, spec) for name, spec in specs.items()}
    files = (file for name in names for file in files_ahead(name, model_folders[name], placement.options))
    read_ahead(files, placement.progress)
    loaded = {name: load_component(name, specs[name], model_folders[name], placement) for name in names}
    pipeline.register_components(**loaded)
    return frozenset(loaded)


def make_stubs(pipeline: Any, partition: ModularPartition, placement: Placement) -> None:
    """Give a pipeline stubs for the components that its blocks do not name but the rest of the model has.

    Its settings, guiders and processors become those of the whole pipeline. A part alone would make them as its own
    blocks declare them; where blocks disagree, the whole follows the first, which may be in another part.

    Not while another thread makes modules: those would have no weights either.

    Raises:
        ModelError: The configuration of one is missing or broken.
    """
    # Not just of the task: geometry may come from a component that only the blocks of another task declare.
    whole = partition.pipeline(partition.whole)
    pipeline.register_to_config(**{spec.name: whole.config[spec.name] for spec in partition.whole.expected_configs})
    for name in whole.config_component_names:
        # Guiders and image processors have no weights: the real ones are cheap, and some encoders read the guider.
        setattr(pipeline, name, getattr(whole, name))
    for name in whole.pretrained_component_names:
        if name in pipeline.component_names or _is_null(partition, name):
            continue
        spec = whole.get_component_spec(name)
        if name not in partition.blocks.component_names and not _is_there(spec):
            continue
        folder = _folder(partition, name, spec)
        stub = load_stub(name, spec, folder, placement.dtype, placement.device, placement.options)
        if stub is not None:
            setattr(pipeline, name, stub)


def size_problem(partition: ModularPartition) -> str:
    """Say why a pipeline would return another size than it is asked for; "" where it would not.

    Its VAE then makes images smaller by another factor than the pipeline reckons with.

    Raises:
        ModelError: The VAE is missing, or its configuration is broken.
    """
    whole = partition.pipeline(partition.blocks)
    if "vae" not in whole.pretrained_component_names or _is_null(partition, "vae"):
        return ""
    spec = whole.get_component_spec("vae")
    # The dtype and device of what is never computed with do not matter.
    whole.vae = load_stub("vae", spec, _folder(partition, "vae", spec), torch.float32, torch.device("cpu"))
    if whole.vae is None:
        raise ModelError(
            f"The index of {partition.model} has something for the vae that is no model: {spec.type_hint}."
        )
    real = getattr(whole.vae.config, "scale_factor_spatial", None)
    reckoned = getattr(whole, "vae_scale_factor_spatial", None)
    if real is None or reckoned is None or real == reckoned:
        return ""
    return (
        f"The VAE of {partition.model} scales by {real}, but {partition.pipeline_class.__name__} assumes {reckoned}"
        " and would return another size than it is asked for: this model cannot be served."
    )


def load_component(name: str, spec: Any, folder: Path, placement: Placement) -> Any:
    """Load a component, for inference.

    Args:
        name: What the pipeline calls it.
        spec: Its `ComponentSpec`.
        folder: Where its files are.
        placement: How its weights are held.

    Raises:
        ModelError: It is broken, lacks weights, or cannot be held so.
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
    except Exception as error:  # Whatever broken files make two libraries raise, the user gets one sentence.
        raise ModelError(f"The {name} in {place} cannot be loaded: {error}") from error
    if not complete:
        raise ModelError(f"The {name} in {place} cannot be loaded: its files lack some of the weights.")
    placement.progress.complete(files.files)
    if not isinstance(component, torch.nn.Module):
        return component
    return placement.prepare(name, component)


def _quantization_problem(folder: Path, placement: Placement) -> str:
    try:
        method = quantized_as(folder)
    except (OSError, ValueError):  # said by who reads the configuration
        return ""
    return problem_with(method, placement.device.type, installed=lambda name: find_spec(name) is not None)


def load_stub(
    name: str,
    spec: Any,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    options: ModelOptions = DEFAULTS,
) -> object | None:
    """Make the stub of a component; see `engines.shadows.make_stub`.

    Raises:
        ModelError: Its configuration is broken.
    """
    try:
        return make_stub(name, spec.type_hint, component_folder(name, folder, options), dtype, device, options)
    except Exception as error:  # Likewise.
        raise ModelError(f"The configuration of {name} in {folder} cannot be read: {error}") from error


def _has_weights(kind: object) -> bool:
    # A component without a type is one that diffusers makes by the name in its configuration.
    return kind is None or (isinstance(kind, type) and issubclass(kind, torch.nn.Module))


def _read(name: str, spec: Any, folder: Path, files: WeightFiles, dtype: torch.dtype) -> tuple[Any, bool]:
    """Read a component, and say whether its files held all of its weights (both libraries go on without some)."""
    kind = spec.type_hint
    if files.form is not WeightFormat.FOLDER:
        component = read_single_file(name, kind, files.files[0], folder, dtype)
        return component, not any(parameter.is_meta for parameter in component.parameters())
    # Weights in the older format are pickles, which run code when they are read.
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


def _folder(partition: ModularPartition, name: str, spec: Any) -> Path:
    source = spec.pretrained_model_name_or_path
    if source is None:
        raise ModelError(
            f"The index of {partition.model} has no {name}, which {partition.pipeline_class.__name__} needs."
        )
    folder = Path(source) / (spec.subfolder or "")
    if not folder.is_dir():
        raise ModelError(incomplete(partition.model, folder, name))
    return folder


def incomplete(model: Path, folder: Path, name: str) -> str:
    """Say that a component has no folder."""
    return (
        f"The model {model} is incomplete: there is no folder {folder} for its {name}. Of what other roles load, the"
        " configuration alone is enough."
    )


def _is_there(spec: Any) -> bool:
    source = spec.pretrained_model_name_or_path
    return source is not None and (Path(source) / (spec.subfolder or "")).is_dir()


def _is_null(partition: ModularPartition, name: str) -> bool:
    # So a classic index says what a model goes without. (In a modular one, nulls with a source were just not loaded.)
    (index,) = partition.index.values()
    return index.get(name) == [None, None]
