"""Choose the partition of a model's pipeline: by blocks, at its text encoders and VAE, or none."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.lora_base import LoraBaseMixin

from triptych.engines.model_options import DEFAULTS, ModelOptions
from triptych.engines.parameters.media import medium_of, results_of, unsupported_result
from triptych.engines.parameters.schema import Medium, Task
from triptych.engines.parameters.serving_config import load_index, load_serving_config
from triptych.engines.partition.blocks import (
    ModularPartition,
    NoWorkflowError,
    load_modular_partition,
    modular_class,
    pipeline_class,
)
from triptych.engines.partition.introspection import classic_partition
from triptych.engines.partition.tasks import class_task_problem, class_tasks, classic_class, task_names
from triptych.engines.stages import ModelError, Stage
from triptych.engines.weights.custom_code import has_custom_code
from triptych.engines.weights.files import check_components
from triptych.engines.weights.loading import load_stub

__all__ = [
    "PartitionStrategy",
    "check_stages",
    "classic_class",
    "describe_serving",
    "lora_class",
    "size_problem",
    "strategy_for",
    "strategy_of",
    "tasks_of",
]


class PartitionStrategy(StrEnum):
    """A way to cut a pipeline into stages, the best first."""

    MODULAR = "modular"
    """diffusers has the pipeline as blocks, which are cut at one of them."""
    CLASSIC = "classic"
    """The pipeline is one function; each stage runs it until it needs a component of another stage."""
    MONOLITHIC = "monolithic"
    """The pipeline is not cut and runs in one process."""


def strategy_of(index: Mapping[str, object]) -> PartitionStrategy:
    """Choose the partition for the index of a model.

    Raises:
        ModelError: diffusers has no such pipeline.
    """
    if modular_class(index) is not None:
        return PartitionStrategy.MODULAR
    return _without_blocks(index)


def strategy_for(model: Path, options: ModelOptions = DEFAULTS) -> PartitionStrategy:
    """Choose the partition for a model.

    Args:
        model: The folder of the model.
        options: The options of the topology.

    Raises:
        ModelError: The folder is not a model, or diffusers has no such pipeline, or none for the wanted partition or
            task.
    """
    index = load_index(model)
    check_components(index, options)
    if options.route == PartitionStrategy.MODULAR:
        pipeline_class(index, model)
        return PartitionStrategy.MODULAR
    uncut = options.route == PartitionStrategy.CLASSIC or has_custom_code(index, model)
    if not uncut and modular_class(index) is not None:
        named = getattr(diffusers, str(index["_class_name"]), None)
        has_class = isinstance(named, type) and issubclass(named, diffusers.DiffusionPipeline)
        try:
            # The blocks of a few pipelines do not support their VAE; the class makes the right size.
            if not has_class or not size_problem(load_modular_partition(model, options)):
                return PartitionStrategy.MODULAR
        except NoWorkflowError as error:
            # The class may have a task that the blocks do not have: for most families, inpainting.
            if not has_class or not _does(
                classic_class(index), task_names(load_serving_config(model, options.task).task)
            ):
                raise ModelError(str(error)) from error
    cls = classic_class(index, options)
    # Check only the task of the topology: the serving config may be for another class of the family.
    if problem := class_task_problem(cls, task_names(options.task), _medium(cls)):
        raise ModelError(problem)
    return _without_blocks(index, options)


def tasks_of(model: Path, options: ModelOptions = DEFAULTS) -> tuple[Task, ...]:
    """Return the tasks of a model.

    Raises:
        ModelError: As `strategy_for`, or its pipeline cannot be cut.
    """
    if strategy_for(model, options) is PartitionStrategy.MODULAR:
        return load_modular_partition(model, options).tasks
    cls = classic_class(load_index(model), options)
    return class_tasks(cls, _medium(cls))


def stage_components(model: Path, options: ModelOptions = DEFAULTS) -> dict[Stage, frozenset[str]]:
    """Return the names of the components that each stage of a model loads, in a process of its own.

    Raises:
        ModelError: As `strategy_for`, or its pipeline cannot be cut.
    """
    if strategy_for(model, options) is PartitionStrategy.MODULAR:
        cut = load_modular_partition(model, options)
        return {
            stage: frozenset(cut.pipeline(blocks).pretrained_component_names) for stage, blocks in cut.blocks_of.items()
        }
    index = load_index(model)
    partition = classic_partition(classic_class(index, options), index)
    return {stage: partition.needed(stage) for stage in Stage}


def strategy_in_process(strategy: PartitionStrategy, stages: Collection[Stage]) -> PartitionStrategy:
    """Return the partition in a process with some stages: with all of them, a classic pipeline need not be cut."""
    return (
        PartitionStrategy.MONOLITHIC
        if strategy is PartitionStrategy.CLASSIC and set(stages) == set(Stage)
        else strategy
    )


def check_stages(
    strategy: PartitionStrategy, index: Mapping[str, object], model: Path, stages: Collection[Stage]
) -> None:
    """Check that a process has all stages of a pipeline that cannot be cut.

    Raises:
        ModelError: It does not.
    """
    if strategy is PartitionStrategy.MONOLITHIC and set(stages) != set(Stage):
        raise ModelError(
            f"The model {model} is for {index['_class_name']}, which cannot be cut into stages: give the topology"
            ' one role of kind="monolithic" instead of encoders, denoisers and decoders.'
        )


def describe_serving(model: Path, options: ModelOptions, *, disaggregated: bool) -> tuple[str, str]:
    """Describe how a model is served, without loading it.

    Args:
        model: The folder of the model.
        options: The options of the topology.
        disaggregated: Whether the stages have processes of their own.

    Returns:
        The description, and why the model cannot be served; one of them is "".
    """
    try:
        index = load_index(model)
        stages = [Stage.ENCODER] if disaggregated else list(Stage)
        strategy = strategy_in_process(strategy_for(model, options), stages)
        tasks = " or ".join(f"{task.name} ({', '.join(task.requires)})" for task in tasks_of(model, options))
        check_stages(strategy, index, model, stages)
    except ModelError as error:
        return "", str(error)
    return f"{index['_class_name']}, by the {strategy} partition: {tasks}", ""


def size_problem(partition: ModularPartition) -> str:
    """Say why a pipeline would return images of another size than requested; "" if it would not.

    That is if the scale factor of its VAE is not the one that the pipeline assumes.

    Raises:
        ModelError: The VAE is missing, or its configuration is broken.
    """
    pipeline = partition.pipeline(partition.blocks)
    if "vae" not in pipeline.pretrained_component_names or partition.goes_without("vae"):
        return ""
    spec = pipeline.get_component_spec("vae")
    # The VAE is not used to compute, so its dtype and device do not matter.
    pipeline.vae = load_stub("vae", spec, partition.component_folder("vae", spec), torch.float32, torch.device("cpu"))
    if pipeline.vae is None:
        raise ModelError(f"The index of {partition.model} has a vae that is not a model: {spec.type_hint}.")
    real = getattr(pipeline.vae.config, "scale_factor_spatial", None)
    computed = getattr(pipeline, "vae_scale_factor_spatial", None)
    if real is None or computed is None or real == computed:
        return ""
    return (
        f"The VAE of {partition.model} scales by {real}, but {partition.pipeline_class.__name__} assumes {computed}"
        " and would return another size than requested: this model cannot be served."
    )


def lora_class(index: Mapping[str, object]) -> Any | None:
    """Return the pipeline class that knows the LoRA formats of a model, or None."""
    candidates = (modular_class(index), getattr(diffusers, str(index["_class_name"]), None))
    return next((cls for cls in candidates if isinstance(cls, type) and issubclass(cls, LoraBaseMixin)), None)


def _does(cls: Any, named: tuple[str, ...]) -> bool:
    return not class_task_problem(cls, named, _medium(cls))


def _medium(cls: Any) -> Medium:
    return medium_of(results_of(cls.__call__))


def _without_blocks(index: Mapping[str, object], options: ModelOptions = DEFAULTS) -> PartitionStrategy:
    cls = classic_class(index, options)
    if made := unsupported_result(results_of(cls.__call__)):
        raise ModelError(
            f"{cls.__name__} makes {made}, which are not images, video or sound: it cannot be served by itself."
        )
    return PartitionStrategy.CLASSIC if classic_partition(cls, index).can_be_cut else PartitionStrategy.MONOLITHIC
