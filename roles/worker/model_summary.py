"""Summarize a model for the topology that `triptych init` writes; see `actors.topology._writer`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import torch

from triptych.actors.topology import INDEX_FILES, ModelSection, ModelSource, ModelSummary, find_source, snapshot
from triptych.engines.model_options import ModelOptions
from triptych.engines.parameters.serving_config import load_index, load_serving_config
from triptych.engines.partition.strategy import (
    PartitionStrategy,
    classic_class,
    describe_serving,
    stage_components,
    strategy_for,
)
from triptych.engines.stages import ModelError, Stage
from triptych.engines.weights.files import WeightFiles, component_files
from triptych.engines.weights.inspection import read_headers
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
            elements=_elements(source, index, options),
            stages=_stages(source, options),
            gpus=tuple(torch.cuda.get_device_properties(gpu).total_memory for gpu in range(torch.cuda.device_count())),
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
    found = {
        name: sum(file.stat().st_size for file in files.files if file.is_file())
        for name, files in _files(source, index, options)
    }
    if source.checkpoint is not None:
        found[source.checkpoint.name] = source.checkpoint.stat().st_size
    return found


def _elements(source: ModelSource, index: dict[str, object], options: ModelOptions) -> dict[str, int]:
    """Count the numbers of the weights, by the headers of the files; two bytes each in a file of another kind."""
    all_files = dict(_files(source, index, options))
    if source.checkpoint is not None:
        all_files[source.checkpoint.name] = WeightFiles(files=(source.checkpoint,))
    found = {}
    for name, files in all_files.items():
        tensors, _ = read_headers(files)  # what is wrong with a file is for `triptych check --model` to say
        sizes = sum(file.stat().st_size for file in files.files if file.is_file())
        found[name] = sum(math.prod(tensor.shape) for tensor in tensors.values()) or sizes // 2
    return found


def _stages(source: ModelSource, options: ModelOptions) -> dict[str, tuple[str, ...]]:
    """Return what each stage loads; a checkpoint in one file counts for the denoiser, which has most of it."""
    found = {stage.value: tuple(sorted(names)) for stage, names in stage_components(source.folder, options).items()}
    if source.checkpoint is not None:
        found[Stage.DENOISER] += (source.checkpoint.name,)
    return found


def _files(source: ModelSource, index: dict[str, object], options: ModelOptions) -> Iterator[tuple[str, WeightFiles]]:
    """Yield each component with weight files of its own."""
    for name, entry in index.items():
        if isinstance(entry, list) and entry[:2] != [None, None]:
            files = component_files(name, source.folder / name, options)
            if files.files and files.files[0] != source.checkpoint:
                yield name, files
