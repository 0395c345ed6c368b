"""Choose how the pipeline of a model is cut: in blocks, at its text encoder and VAE, or not at all."""

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
    """A way to serve a pipeline, the best first."""

    MODULAR = "modular"
    """diffusers has the pipeline in blocks, which are cut by one rule."""
    CLASSIC = "classic"
    """The pipeline is one function, which each stage runs until it needs what another one has."""
    MONOLITHIC = "monolithic"
    """The pipeline runs as a whole, in one process."""


def strategy_of(index: Mapping[str, object]) -> PartitionStrategy:
    """Choose the strategy for the index of a model.

    Raises:
        ModelError: diffusers has no such pipeline.
    """
    if modular_class(index) is not None:
        return PartitionStrategy.MODULAR
    return _without_blocks(index)


def strategy_for(model: Path, options: ModelOptions = DEFAULTS) -> PartitionStrategy:
    """Choose the strategy for a model.

    Args:
        model: Its folder.
        options: How it is cut.

    Raises:
        ModelError: It is no model, or diffusers has no such pipeline, or none for the strategy or the task.
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
            # A few pipelines know a VAE that their blocks do not: without blocks they make the right size.
            if not has_class or not size_problem(load_modular_partition(model, options)):
                return PartitionStrategy.MODULAR
        except NoWorkflowError as error:
            # What the blocks do not do, the class may: they have no inpainting for most families.
            if not has_class or not _does(
                classic_class(index), task_names(load_serving_config(model, options.task).task)
            ):
                raise ModelError(str(error)) from error
    cls = classic_class(index, options)
    # A card is of the folder; that of another class of the same family may say anything else.
    if problem := class_task_problem(cls, task_names(options.task), _medium(cls)):
        raise ModelError(problem)
    return _without_blocks(index, options)


def tasks_of(model: Path, options: ModelOptions = DEFAULTS) -> tuple[Task, ...]:
    """Say what requests to a model may be for.

    Raises:
        ModelError: As `strategy_for`, or its pipeline cannot be cut.
    """
    if strategy_for(model, options) is PartitionStrategy.MODULAR:
        return load_modular_partition(model, options).tasks
    cls = classic_class(load_index(model), options)
    return class_tasks(cls, _medium(cls))


def strategy_in_process(strategy: PartitionStrategy, stages: Collection[Stage]) -> PartitionStrategy:
    """Choose the strategy in a process that has some stages: with all of them there is no need to cut a function."""
    return (
        PartitionStrategy.MONOLITHIC
        if strategy is PartitionStrategy.CLASSIC and set(stages) == set(Stage)
        else strategy
    )


def check_stages(
    strategy: PartitionStrategy, index: Mapping[str, object], model: Path, stages: Collection[Stage]
) -> None:
    """Refuse to run a pipeline in parts that it does not have.

    Raises:
        ModelError: The strategy has no parts, and not all stages are in one process.
    """
    if strategy is PartitionStrategy.MONOLITHIC and set(stages) != set(Stage):
        raise ModelError(
            f"The model {model} is for {index['_class_name']}, which cannot be run in parts: give the topology one"
            ' role of kind="monolithic" in the place of encoders, denoisers and decoders.'
        )


def describe_serving(model: Path, options: ModelOptions, *, disaggregated: bool) -> tuple[str, str]:
    """Say how a model would be served, without loading it.

    Args:
        model: Its folder.
        options: How it is cut.
        disaggregated: Whether stages have processes of their own.

    Returns:
        A sentence; and another one, of why the model cannot be served, or "".
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
    """Say why a pipeline would return another size than it is asked for; "" where it would not.

    Its VAE then makes images smaller by another factor than the pipeline reckons with.

    Raises:
        ModelError: The VAE is missing, or its configuration is broken.
    """
    whole = partition.pipeline(partition.blocks)
    if "vae" not in whole.pretrained_component_names or partition.goes_without("vae"):
        return ""
    spec = whole.get_component_spec("vae")
    # The dtype and device of what is never computed with do not matter.
    whole.vae = load_stub("vae", spec, partition.component_folder("vae", spec), torch.float32, torch.device("cpu"))
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


def lora_class(index: Mapping[str, object]) -> Any | None:
    """Find the pipeline class that knows the LoRA formats of a model, if there is one."""
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
            f"{cls.__name__} makes {made}, which are no image, video or sound: it cannot be served by itself."
        )
    return PartitionStrategy.CLASSIC if classic_partition(cls, index).can_be_cut else PartitionStrategy.MONOLITHIC
