"""Load the components that a panel needs, and shadows of those that it does not."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from triptych.engines.options import DEFAULTS, ModelOptions
from triptych.engines.panels import ModelError
from triptych.engines.placing import Placement
from triptych.engines.quantization import problem_with, quantized_as
from triptych.engines.read_ahead import read_ahead
from triptych.engines.shadows import is_several, shadow
from triptych.engines.single_files import read_single_file
from triptych.engines.split import Split
from triptych.engines.weight_files import Form, WeightFiles, component_files, component_folder, files_ahead


def load_components(pipeline: Any, split: Split, placement: Placement) -> frozenset[str]:
    """Load the weights and tokenizers that a pipeline's blocks name.

    Returns:
        The names of what was loaded.

    Raises:
        ModelError: One is missing or broken. (The pipeline's own way to load would warn and go on without it.)
    """
    names = [name for name in pipeline.pretrained_component_names if not _is_null(split, name)]
    specs = {name: pipeline.get_component_spec(name) for name in names}
    folders = {name: _folder(split, name, spec) for name, spec in specs.items()}
    files = (file for name in names for file in files_ahead(name, folders[name], placement.options))
    read_ahead(files, placement.progress)
    loaded = {name: load_component(name, specs[name], folders[name], placement) for name in names}
    pipeline.register_components(**loaded)
    return frozenset(loaded)


def make_shadows(pipeline: Any, split: Split, placement: Placement) -> None:
    """Give a pipeline stand-ins for the components that its blocks do not name but the rest of the model has.

    Its settings, guiders and processors become those of the whole pipeline. A part alone would make them as its own
    blocks declare them; where blocks disagree, the whole follows the first, which may be in another part.

    Not while another thread makes modules: those would have no weights either.

    Raises:
        ModelError: The configuration of one is missing or broken.
    """
    # Not just of the task: geometry may come from a component that only the blocks of another task declare.
    whole = split.pipeline(split.whole)
    pipeline.register_to_config(**{spec.name: whole.config[spec.name] for spec in split.whole.expected_configs})
    for name in whole.config_component_names:
        # Guiders and image processors have no weights: the real ones are cheap, and some encoders read the guider.
        setattr(pipeline, name, getattr(whole, name))
    for name in whole.pretrained_component_names:
        if name in pipeline.component_names or _is_null(split, name):
            continue
        spec = whole.get_component_spec(name)
        if name not in split.blocks.component_names and not _is_there(spec):
            continue
        folder = _folder(split, name, spec)
        stand_in = load_shadow(name, spec, folder, placement.dtype, placement.device, placement.options)
        if stand_in is not None:
            setattr(pipeline, name, stand_in)


def geometry_problem(split: Split) -> str:
    """Say why a pipeline would return another size than it is asked for; "" where it would not.

    Its VAE then makes pictures smaller by another factor than the pipeline reckons with.

    Raises:
        ModelError: The VAE is missing, or its configuration is broken.
    """
    whole = split.pipeline(split.blocks)
    if "vae" not in whole.pretrained_component_names or _is_null(split, "vae"):
        return ""
    spec = whole.get_component_spec("vae")
    # The dtype and device of what is never computed with do not matter.
    whole.vae = load_shadow("vae", spec, _folder(split, "vae", spec), torch.float32, torch.device("cpu"))
    if whole.vae is None:
        raise ModelError(f"The index of {split.model} has something for the vae that is no model: {spec.type_hint}.")
    real = getattr(whole.vae.config, "scale_factor_spatial", None)
    reckoned = getattr(whole, "vae_scale_factor_spatial", None)
    if real is None or reckoned is None or real == reckoned:
        return ""
    return (
        f"The VAE of {split.model} scales by {real}, but {split.pipeline_class.__name__} reckons with {reckoned}"
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
    place = folder if files.form is Form.FOLDER else files.files[0]
    if files.problem:
        raise ModelError(f"The {name} in {place} {files.problem}.")
    if files.form is Form.FOLDER and files.files and (problem := _quantization_problem(folder, placement)):
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
    return placement.settle(name, component)


def _quantization_problem(folder: Path, placement: Placement) -> str:
    try:
        method = quantized_as(folder)
    except (OSError, ValueError):  # said by who reads the configuration
        return ""
    return problem_with(method, placement.device.type, installed=lambda name: find_spec(name) is not None)


def load_shadow(
    name: str,
    spec: Any,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    options: ModelOptions = DEFAULTS,
) -> object | None:
    """Make the stand-in of a component; see `engines.shadows.shadow`.

    Raises:
        ModelError: Its configuration is broken.
    """
    try:
        return shadow(name, spec.type_hint, component_folder(name, folder, options), dtype, device, options)
    except Exception as error:  # Likewise.
        raise ModelError(f"The configuration of {name} in {folder} cannot be read: {error}") from error


def _has_weights(kind: object) -> bool:
    # A component without a type is one that diffusers makes by the name in its configuration.
    return kind is None or (isinstance(kind, type) and issubclass(kind, torch.nn.Module))


def _read(name: str, spec: Any, folder: Path, files: WeightFiles, dtype: torch.dtype) -> tuple[Any, bool]:
    """Read a component, and say whether its files held all of its weights (both libraries go on without some)."""
    kind = spec.type_hint
    if files.form is not Form.FOLDER:
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
    several = is_several(kind)
    component = kind.from_pretrained(str(folder), **options) if several else spec.load(**place, **options)
    return component, not any(parameter.is_meta for parameter in component.parameters())


def _folder(split: Split, name: str, spec: Any) -> Path:
    source = spec.pretrained_model_name_or_path
    if source is None:
        raise ModelError(f"The index of {split.model} has no {name}, which {split.pipeline_class.__name__} needs.")
    folder = Path(source) / (spec.subfolder or "")
    if not folder.is_dir():
        raise ModelError(incomplete(split.model, folder, name))
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


def _is_null(split: Split, name: str) -> bool:
    # So a classic index says what a model goes without. (In a modular one, nulls with a source were just not loaded.)
    (index,) = split.index.values()
    return index.get(name) == [None, None]
