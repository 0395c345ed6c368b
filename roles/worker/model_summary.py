"""Summarize a model for the topology that `triptych add` writes; see `actors.topology._writer`."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import msgspec
import torch

from triptych.actors.topology import INDEX_FILES, ModelSection, ModelSource, ModelSummary, find_source, snapshot
from triptych.engines.model_options import ModelOptions
from triptych.engines.parameters.serving_config import load_index, load_serving_config
from triptych.engines.partition.strategy import PartitionStrategy, classic_class, describe_serving, strategy_for
from triptych.engines.stages import ModelError
from triptych.engines.weights.files import component_files
from triptych.engines.weights.single_files import configuration_of

_CONFIGURATION = '--include "*.json" --include "*.txt" --include "*.model"'
_SIZES = ("width", "height", "num_frames")


def summarize_model(section: ModelSection, base: Path) -> tuple[ModelSummary, str]:
    """Summarize a model without loading it.

    Args:
        section: The model's section, with its path.
        base: Folder that its paths are relative to.

    Returns:
        The summary; and why the model cannot be served, or "".
    """
    nothing = ModelSummary(pipeline="", disaggregated=False, sentence="")
    try:
        section = _with_config(section, base)
        source = find_source(section, base)
        if source.problem:
            written = getattr(section, source.key)
            return nothing, f"{source.key} {written} {source.problem}: {source.fix}."
        options = ModelOptions(checkpoint=source.checkpoint, components=tuple(source.components.items()))
        index = load_index(source.folder)
        disaggregated = strategy_for(source.folder, options) is not PartitionStrategy.MONOLITHIC
        sentence, problem = describe_serving(source.folder, options, disaggregated=disaggregated)
        facts = ModelSummary(
            pipeline=str(index["_class_name"]),
            disaggregated=disaggregated,
            sentence=sentence,
            config=section.config,
            defaults=_defaults(source.folder, index),
            weights=_weights(source, index, options),
            gpus=torch.cuda.device_count(),
        )
    except ModelError as error:
        return nothing, str(error)
    return facts, problem


def _with_config(section: ModelSection, base: Path) -> ModelSection:
    """Find local configurations for a checkpoint without any: those of the repository that diffusers would fetch."""
    checkpoint = base / Path(section.path).expanduser()
    if section.config or not checkpoint.is_file() or checkpoint.suffix != ".safetensors":
        return section
    repository = configuration_of(checkpoint)
    found = snapshot(repository)
    if found is None or not any((found / name).is_file() for name in INDEX_FILES):
        raise ModelError(
            f"{section.path} has weights, but no configurations and no tokenizers. It looks like a model of the kind of"
            f" {repository}: run hf download {repository} {_CONFIGURATION}, or give a folder with --config."
        )
    return msgspec.structs.replace(section, config=repository)


def _defaults(folder: Path, index: dict[str, object]) -> dict[str, object]:
    """Return the default sizes: those of the serving config, else those of the pipeline's class."""
    found: dict[str, object] = dict(load_serving_config(folder).defaults)
    try:
        cls: Any = classic_class(index)
    except ModelError:  # the index has only blocks
        return found
    parameters = inspect.signature(cls.__call__).parameters
    declared = {name: parameters[name].default for name in _SIZES if name in parameters}
    return {name: value for name, value in declared.items() if isinstance(value, int)} | found


def _weights(source: ModelSource, index: dict[str, object], options: ModelOptions) -> dict[str, int]:
    found = {}
    for name, entry in index.items():
        if isinstance(entry, list) and entry[:2] != [None, None]:
            files = component_files(name, source.folder / name, options).files
            if files and files[0] != source.checkpoint:
                found[name] = sum(file.stat().st_size for file in files if file.is_file())
    if source.checkpoint is not None:
        found[source.checkpoint.name] = source.checkpoint.stat().st_size
    return found
