"""Cut a Modular Diffusers pipeline into three stages by one rule, without code for families.

Each pipeline has exactly one top-level block named `denoise`. The blocks before it are the encoder, the block itself is
the denoiser (it also makes noise and timesteps, so the state of a scheduler is never sent), and the blocks after it are
the decoder. A stage needs of the earlier stages only the inputs that its blocks declare.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import CodeType
from typing import Any, Final

import diffusers
from diffusers.modular_pipelines.modular_pipeline import (
    MODULAR_PIPELINE_MAPPING,
    ConditionalPipelineBlocks,
    LoopSequentialPipelineBlocks,
    SequentialPipelineBlocks,
)
from diffusers.modular_pipelines.modular_pipeline_utils import InsertableDict
from diffusers.pipelines.auto_pipeline import _get_model

from triptych.engines.model_options import DEFAULTS, ModelOptions
from triptych.engines.parameters.aliases import GUIDANCE_SCALE, TRUE_CFG_SCALE
from triptych.engines.parameters.declarations import is_internal, parameters_of_blocks
from triptych.engines.parameters.media import medium_of
from triptych.engines.parameters.schema import Task
from triptych.engines.parameters.serving_config import INDEX_NAMES, load_index, load_serving_config
from triptych.engines.partition.tasks import (
    ANY,
    ClassRequirements,
    classic_class,
    is_same,
    requirements_of,
    task_name,
    task_names,
)
from triptych.engines.stages import ModelError, Stage
from triptych.engines.weights.loading import missing_folder

KWARGS_MAPPING: Final = "kwargs_mapping"
"""The key in a payload of the groups of names (`kwargs_type`) that some blocks take as a group."""
_IP_ADAPTER: Final = "ip_adapter_image"
_OF_INPAINTING: Final = 9
"""Input channels of a UNet that was trained to inpaint: latents, mask, and latents of the masked image."""
_CONTROL_WORDS: Final = re.compile("ControlNet|Union|Img2Img|Inpaint")
_DECLARATIONS: Final = frozenset(
    {"inputs", "loop_inputs", "outputs", "intermediate_outputs", "expected_components", "expected_configs"}
    | {"description", "required_inputs", "doc"}
)
"""Members of a block that declare its inputs without reading them."""


class NoWorkflowError(ModelError):
    """The blocks of a pipeline have no workflow for a task, or for the class that the index names."""


@dataclass(frozen=True)
class ModularPartition:
    """A modular pipeline, cut into stages.

    Attributes:
        model: The folder of the model.
        pipeline_class: The class of the pipeline, a `diffusers.ModularPipeline`.
        index: The index as an argument of the pipeline: `modular_config_dict` or `config_dict`.
        all_blocks: The blocks of all tasks.
        blocks: The blocks of the served tasks, `SequentialPipelineBlocks`.
        blocks_of: The blocks of each stage, `SequentialPipelineBlocks`.
        outputs: The names of the results of the decoder, such as "images".
        tasks: The served tasks; the inputs of a request decide which one it is for.
        as_class: Whether missing inputs have the defaults of the class that the index names.
        defaults: The defaults of that class that replace those of the blocks, with the scale of its guiders.
        aliases: The names of inputs in the blocks, by different names of that class.
    """

    model: Path
    pipeline_class: Any
    index: Mapping[str, dict[str, object]]
    all_blocks: Any
    blocks: Any
    blocks_of: Mapping[Stage, Any]
    outputs: tuple[str, ...]
    tasks: tuple[Task, ...] = ()
    as_class: bool = False
    defaults: Mapping[str, object] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def required(self) -> frozenset[str]:
        """The names of the inputs that all tasks require."""
        return _required(self.tasks)

    @property
    def task(self) -> str:
        """The task; "any" if there are several."""
        return self.tasks[0].name if len(self.tasks) == 1 else ANY

    def pipeline(self, blocks: Any) -> Any:
        """Make a pipeline of some of the blocks, without loading weights.

        Raises:
            ModelError: diffusers cannot make it from the index.
        """
        try:
            # Use the class of the whole pipeline: it computes geometry, and that of the blocks may be another one.
            return self.pipeline_class(blocks=blocks, pretrained_model_name_or_path=str(self.model), **self.index)
        except Exception as error:  # diffusers may raise anything for a wrong index; report it as one sentence
            raise ModelError(f"The index of {self.model} cannot be followed: {error}") from error

    def component_folder(self, name: str, spec: Any) -> Path:
        """Return the folder of a component.

        Args:
            name: The name of the component.
            spec: Its `ComponentSpec`.

        Raises:
            ModelError: The index does not have the component, or there is no such folder.
        """
        if spec.pretrained_model_name_or_path is None:
            raise ModelError(f"The index of {self.model} has no {name}, which {self.pipeline_class.__name__} needs.")
        folder = _folder_of(spec)
        if not folder.is_dir():
            raise ModelError(missing_folder(self.model, folder, name))
        return folder

    def has_folder(self, spec: Any) -> bool:
        """Whether the component of a `ComponentSpec` is in the index and has a folder."""
        return spec.pretrained_model_name_or_path is not None and _folder_of(spec).is_dir()

    def goes_without(self, name: str) -> bool:
        """Whether the index says, with nulls, that the model does not have a component."""
        # In a modular index, nulls beside a source mean a component that was not loaded when it was saved.
        (index,) = self.index.values()
        return index.get(name) == [None, None]


def load_modular_partition(model: Path, options: ModelOptions = DEFAULTS) -> ModularPartition:
    """Read the index of a model and cut its pipeline, without loading weights.

    Args:
        model: The folder of the model.
        options: The options of the topology.

    Raises:
        NoWorkflowError: Its blocks do not have the wanted tasks.
        ModelError: The folder is not such a model, or its pipeline cannot be cut.
    """
    index = load_index(model)
    serving_config = load_serving_config(model, options.task)
    found = pipeline_class(index, model)
    all_blocks = _blocks_class(found, index)()
    missing = {
        spec.name
        for spec in all_blocks.expected_components
        if spec.default_creation_method == "from_pretrained" and _is_absent(index, spec.name)
    }
    own = _own_needs(index, model)
    names = choose_tasks(all_blocks, task_names(serving_config.task), own, missing)
    blocks = prune(all_blocks, names or ANY, serving_config.defaults, missing)
    blocks_of = cut_blocks(blocks)
    made = blocks_of[Stage.DECODER].intermediate_output_names
    outputs = tuple(name for name in all_blocks.output_names if name in made) or tuple(made)
    tasks = tuple(_task(all_blocks, name) for name in names) or (
        _only_task(blocks, outputs, task_names(serving_config.task), own),
    )
    # With `route = "modular"`, and for blocks chosen by a setting of the index, use the defaults of the blocks.
    is_plain = options.route != "modular" and found is modular_class({"_class_name": index["_class_name"]})
    as_class = own is not None and is_plain and set(_own_tasks(all_blocks, own, missing)).issuperset(names)
    defaults = _class_defaults(blocks, own) if own and as_class else {}
    taken = {item.name for item in blocks.inputs}
    aliases = {
        name: other for name, other in (own.aliases if own else {}).items() if name not in taken and other in taken
    }
    kind = "modular_config_dict" if (model / INDEX_NAMES[0]).is_file() else "config_dict"
    return ModularPartition(
        model, found, {kind: index}, all_blocks, blocks, blocks_of, outputs, tasks, as_class, defaults, aliases
    )


def pipeline_class(index: Mapping[str, object], model: Path) -> Any:
    """Return the modular pipeline class for an index, which may name a classic class.

    Raises:
        ModelError: There is none.
    """
    found = modular_class(index)
    if found is None:
        raise ModelError(
            f"The model {model} is for {index['_class_name']}, which diffusers {diffusers.__version__} cannot run in"
            " blocks: it has no modular pipeline for it."
        )
    return found


def modular_class(index: Mapping[str, object]) -> Any | None:
    """Return the modular pipeline class for an index, or None."""
    name = str(index["_class_name"])
    choose = MODULAR_PIPELINE_MAPPING.get(_get_model(name) or "")
    # Half of the families are not in that table; derive the name.
    stem = name.removesuffix("Pipeline").removesuffix("Modular")
    stems = (stem, stem.replace("ImageToVideo", "Image2Video"), stem.replace("ImageToVideo", ""))
    names = [choose(index)] if choose else [f"{stem}ModularPipeline" for stem in stems]
    found = next((getattr(diffusers, name) for name in names if hasattr(diffusers, name)), None)
    if found is None and "ControlNet" in stem:
        # The modular pipeline of a family is the same with and without a ControlNet.
        return modular_class({**index, "_class_name": f"{_CONTROL_WORDS.sub('', stem)}Pipeline"})
    return found if found is not None and found.default_blocks_name else None


def prune(
    blocks: Any,
    task: str | Sequence[str],
    given: Mapping[str, object] | None = None,
    missing: Collection[str] = frozenset(),
) -> Any:
    """Keep the blocks that some tasks run, so that no stage loads weights for other tasks.

    Blocks that run for an optional input of these tasks are kept, too; each request then chooses.

    Args:
        blocks: All blocks of a pipeline.
        task: Workflows of the pipeline, such as "text-to-image"; "" for the first that needs only a prompt; "any" for
            all that a request can choose.
        given: The inputs that each request has; blocks that would compute them are dropped.
        missing: The components that the model does not have. A block that needs one is dropped if another block, or
            none, can replace it; a request then gives what the block would have made.

    Raises:
        NoWorkflowError: The pipeline has no such task.
    """
    flows = _workflows(blocks)
    if not flows:
        return blocks
    names = choose_tasks(blocks, task_names(task) if isinstance(task, str) else tuple(task), None, missing)
    workflow_states = [_workflow(blocks, inputs, given or {}, missing) for name in names for inputs in flows[name]]
    return SequentialPipelineBlocks.from_blocks_dict(_kept(blocks, workflow_states, missing))


def choose_tasks(
    blocks: Any, named: Sequence[str], own: ClassRequirements | None = None, missing: Collection[str] = frozenset()
) -> tuple[str, ...]:
    """Choose the workflows to serve.

    Args:
        blocks: All blocks of a pipeline.
        named: The tasks that the topology or the serving config names; may be empty. "any" stands for all that a
            request can choose and the model has the components for.
        own: The inputs of the class that the index names; None if that class is modular.
        missing: The components that the model does not have.

    Returns:
        The names of workflows; () if the pipeline has only one, which has no name.

    Raises:
        NoWorkflowError: There is no such workflow, or none for the class.
    """
    flows = _workflows(blocks)
    if not flows:
        if own and not own.required <= set(blocks.input_names):
            raise NoWorkflowError(f"The blocks of this pipeline take no {', '.join(sorted(own.required))}.")
        return ()
    if ANY in named:
        return tuple(name for name in flows if _can_be_asked(blocks, name) and _has_components(blocks, name, missing))
    if named:
        chosen = tuple(dict.fromkeys(_find(name, flows) for name in named))
        adapted = [name for name in chosen if any(_IP_ADAPTER in inputs for inputs in flows[name])]
        if adapted and len(chosen) > 1:
            raise ModelError(f'The task "{adapted[0]}" cannot be served beside others: each request shows it an image.')
        return chosen
    if own:
        if not (found := _own_tasks(blocks, own, missing)):
            raise NoWorkflowError(f"The blocks have no task for what the class needs: they do {', '.join(flows)}.")
        return found
    return (next((name for name in flows if flows[name] == [{"prompt": True}]), next(iter(flows))),)


def required(blocks: Any, task: str) -> frozenset[str]:
    """Return the names of the inputs that a task requires.

    Args:
        blocks: All blocks of a pipeline, which declare most inputs as optional, since other tasks do not need them.
        task: The task, as in `prune`.

    Raises:
        NoWorkflowError: The pipeline has no such task.
    """
    return _required([_task(blocks, name) for name in choose_tasks(blocks, task_names(task))])


def _required(tasks: Sequence[Task]) -> frozenset[str]:
    return frozenset.intersection(*(frozenset(task.requires) for task in tasks)) if tasks else frozenset()


def _workflows(blocks: Any) -> dict[str, list[dict[str, object]]]:
    """Return the sets of inputs that select each workflow of a pipeline; {} if it has only one."""
    workflows: dict[str, Any] = getattr(blocks, "_workflow_map", None) or {}
    return {name: list(inputs) if isinstance(inputs, tuple) else [inputs] for name, inputs in workflows.items()}


def _find(task: str, flows: Mapping[str, object]) -> str:
    name = next((name for name in flows if is_same(name, task)), None)
    if name is None:
        raise NoWorkflowError(f'The task "{task}" is not one of this pipeline: choose of {", ".join(flows)}, any.')
    return name


def _own_needs(index: Mapping[str, object], model: Path) -> ClassRequirements | None:
    """Return the inputs of the class that an index names; None if that class is modular.

    Raises:
        NoWorkflowError: The model has several ControlNets.
    """
    name = str(index["_class_name"])
    named = getattr(diffusers, name, None)
    if not isinstance(named, type) or not issubclass(named, diffusers.DiffusionPipeline):
        return None
    entry = index.get("controlnet")
    if isinstance(entry, list) and str(entry[-1]).startswith("Multi"):
        raise NoWorkflowError("The blocks of this pipeline take one ControlNet, not several.")
    own = requirements_of(classic_class(index))
    if _channels(model / "unet") != _OF_INPAINTING:
        return own
    painted = {"image", "mask_image"}
    return replace(own, required=own.required | painted, taken=own.taken | painted)


def _channels(folder: Path) -> object:
    try:
        return json.loads((folder / "config.json").read_bytes())["in_channels"]
    except (OSError, ValueError, LookupError, TypeError):  # reported when it is loaded
        return None


def _own_tasks(blocks: Any, own: ClassRequirements, missing: Collection[str]) -> tuple[str, ...]:
    """Return the workflows of a class: those that its required inputs, and only inputs of its own, select."""
    flows = _workflows(blocks)
    found = []
    for name, (inputs, *_) in flows.items():
        triggers = {trigger for trigger, value in inputs.items() if value is True}
        does = own.required <= triggers <= own.taken and triggers == inputs.keys()
        if does and _can_be_asked(blocks, name) and _has_components(blocks, name, missing):
            found.append(name)
    return tuple(found)


def _can_be_asked(blocks: Any, name: str) -> bool:
    """Whether a request can have the inputs that select a workflow."""
    public = {parameter.name for parameter in parameters_of_blocks(blocks)}
    # With an IP adapter loaded, each request must have an image for it, so such a task is served alone.
    return any(inputs.keys() <= public - {_IP_ADAPTER} for inputs in _workflows(blocks)[name])


def _has_components(blocks: Any, name: str, missing: Collection[str]) -> bool:
    """Whether a workflow needs no missing components other than those that all workflows need."""
    if not missing:
        return True
    lacking = [
        set(prune(blocks, [flow], missing=missing).component_names) & set(missing) for flow in _workflows(blocks)
    ]
    own = set(prune(blocks, [name], missing=missing).component_names) & set(missing)
    return own <= set.intersection(*lacking)


def _task(blocks: Any, name: str) -> Task:
    flows = _workflows(blocks)[name]
    needed = [{trigger for trigger, value in inputs.items() if value is True} for inputs in flows]
    taken = set().union(*(inputs.keys() for inputs in flows))
    return Task(name, tuple(sorted(set.intersection(*needed))), tuple(sorted(taken)))


def _only_task(blocks: Any, outputs: Collection[str], named: Sequence[str], own: ClassRequirements | None) -> Task:
    """Return the task of a pipeline that has only one.

    Raises:
        NoWorkflowError: Another task is wanted.
    """
    medium = medium_of(outputs)
    needed = {item.name for item in parameters_of_blocks(blocks) if item.required} | (own.required if own else set())
    name = task_name(needed, medium, prompt="prompt" in blocks.input_names)
    for other in named:
        if other != ANY and not is_same(other, name):
            raise NoWorkflowError(f'The task "{other}" is not one of this pipeline, which does {name} alone.')
    return Task(name, tuple(sorted(needed)), tuple(sorted(needed)))


def _class_defaults(blocks: Any, own: ClassRequirements) -> dict[str, object]:
    public = {parameter.name: parameter for parameter in parameters_of_blocks(blocks)}
    declared = {item.name: item.default for item in blocks.inputs if item.name}
    found: dict[str, object] = {
        name: value
        for name, value in own.defaults.items()
        if name in public and isinstance(value, (bool, int, float, str)) and value != declared[name]
    }
    scale = own.defaults.get(GUIDANCE_SCALE, own.defaults.get(TRUE_CFG_SCALE))
    return found if GUIDANCE_SCALE in declared or scale is None else {**found, GUIDANCE_SCALE: scale}


# Which blocks a request may run ------------------------------------------------------------------------------------


@dataclass
class _Workflow:
    """The values that the requests of a task have at some point of a pipeline.

    Attributes:
        given: The values that exist, by name; True for an unknown value.
        maybe: The names of values that may exist.
    """

    given: dict[str, object]
    maybe: set[str]

    def inputs(self, names: Sequence[str]) -> Iterator[dict[str, object]]:
        """Yield all combinations of values that a block may get for some names."""
        known = {name: self.given.get(name) for name in names}
        open_names = [name for name in names if name in self.maybe and name not in self.given]
        for values in itertools.product((None, True), repeat=len(open_names)):
            yield {**known, **dict(zip(open_names, values, strict=True))}


def _workflow(
    blocks: Any, inputs: Mapping[str, object], given: Mapping[str, object], missing: Collection[str]
) -> _Workflow:
    """Return the values that requests of a workflow have, and those that they may have.

    They may have the inputs and outputs of its blocks, unless these select another workflow. Each such input may select
    more blocks, which have more inputs.
    """
    known = {**given, **inputs}
    others = [
        set(other) for several in _workflows(blocks).values() for other in several if not other.items() <= known.items()
    ]
    public = {name for name in blocks.input_names if name and not is_internal(name)}
    switching = branch_inputs(blocks) & public
    maybe: set[str] = set()
    while True:
        kept = _kept(blocks, [_Workflow(dict(known), set(maybe))], missing).values()
        seen = {item.name for block in kept for item in (*block.inputs, *block.intermediate_outputs)}
        more = {
            name
            for name in (seen & switching) - known.keys() - maybe
            if not any(other <= {*inputs, name} for other in others)
        }
        if not more:
            return _Workflow(known, maybe)
        maybe |= more


def _kept(blocks: Any, workflow_states: list[_Workflow], missing: Collection[str]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for name, block in blocks.sub_blocks.items():
        kept |= _reached(name, block, workflow_states, missing)
    return kept


def _reached(name: str, block: Any, workflow_states: list[_Workflow], missing: Collection[str]) -> dict[str, Any]:
    """Return the parts of a block that any of the workflows runs, and add its outputs to their values.

    Sequences are flattened, as by `get_execution_blocks`. A conditional block is kept if there is a choice.
    """
    if isinstance(block, ConditionalPipelineBlocks):
        return _chosen(name, block, workflow_states, missing)
    if block.sub_blocks and not isinstance(block, LoopSequentialPipelineBlocks):
        return {f"{name}.{inner}": kept for inner, kept in _kept(block, workflow_states, missing).items()}
    for way in workflow_states:
        way.given.update({output.name: True for output in block.intermediate_outputs})
    return {name: block}


def _chosen(name: str, block: Any, workflow_states: list[_Workflow], missing: Collection[str]) -> dict[str, Any]:
    options = [_options(block, way) for way in workflow_states]
    every = set().union(*options)
    possible = {option for option in every if option is None or not _needs(block.sub_blocks[option], missing)} or every
    options = [(found & possible) or found for found in options]
    every = set().union(*options)
    if every == {None}:
        return {}
    if len(every) == 1:
        return _reached(name, block.sub_blocks[next(iter(every))], workflow_states, missing)
    kept = copy.copy(block)
    kept.sub_blocks = InsertableDict()
    made: list[list[_Workflow]] = [[] for _ in workflow_states]
    for option, inner in block.sub_blocks.items():
        if option not in every:
            continue
        forks = {
            at: _Workflow(dict(way.given), set(way.maybe))
            for at, way in enumerate(workflow_states)
            if option in options[at]
        }
        rows = _reached(option, inner, list(forks.values()), missing)
        single = len(rows) == 1 and option in rows
        kept.sub_blocks[option] = rows[option] if single else SequentialPipelineBlocks.from_blocks_dict(rows)
        for at, fork in forks.items():
            made[at].append(fork)
    for way, found, forked in zip(workflow_states, options, made, strict=True):
        sure = set.intersection(*(set(fork.given) for fork in forked)) if forked and None not in found else set()
        way.maybe |= set().union(*(fork.given.keys() | fork.maybe for fork in forked)) - way.given.keys() - sure
        way.given |= dict.fromkeys(sure - way.given.keys(), True)
    return {name: kept}


def _options(block: Any, way: _Workflow) -> set[str | None]:
    """Return the names of the blocks that a conditional block may choose; None stands for no block."""
    found: set[str | None] = set()
    for inputs in way.inputs([name for name in block.block_trigger_inputs if name]):
        try:
            found.add(block.select_block(**inputs) or block.default_block_name)
        except ValueError:  # the family does not take these inputs together
            continue
    return found or {block.default_block_name}


def _needs(block: Any, missing: Collection[str]) -> bool:
    return not set(missing).isdisjoint(block.component_names)


def unused_inputs(blocks: Any) -> frozenset[str]:
    """Return the names of inputs that blocks declare but never read, except to check their type."""
    declared: set[str] = set()
    read: set[str] = set()
    for block in _blocks_in(blocks):
        names = {item.name for item in block.inputs if item.name}
        declared |= names
        cls: type = type(block)
        read |= names & _names_read(cls) | {name for name in getattr(block, "block_trigger_inputs", ()) if name}
    return frozenset(declared - read)


def _blocks_in(block: Any) -> Iterator[Any]:
    for inner in block.sub_blocks.values():
        yield inner
        yield from _blocks_in(inner)


@functools.cache
def _names_read(cls: type) -> frozenset[str]:
    """Return all names in the code of a block's class and in the functions of its module."""
    found: set[str] = set()
    for base in cls.__mro__:
        if base.__module__.startswith("diffusers.modular_pipelines.") and not base.__module__.endswith(
            ".modular_pipeline"
        ):
            beside = (member for member in vars(sys.modules[base.__module__]).values() if inspect.isfunction(member))
            own = (member for name, member in vars(base).items() if name not in _DECLARATIONS | {"check_inputs"})
            for member in (*beside, *own):
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                found |= _names(getattr(inspect.unwrap(function) if callable(function) else None, "__code__", None))
    return frozenset(found)


def _names(code: CodeType | None) -> set[str]:
    if code is None:
        return set()
    texts = {constant for constant in code.co_consts if isinstance(constant, str) and constant.isidentifier()}
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(texts, *(_names(constant) for constant in inner))


# Where they are cut ------------------------------------------------------------------------------------------------


def cut_blocks(blocks: Any) -> dict[Stage, Any]:
    """Cut blocks at the one named `denoise`.

    Raises:
        ModelError: There is not exactly one.
    """
    names = list(blocks.sub_blocks)
    inside = [index for index, name in enumerate(names) if name.split(".")[0] == "denoise"]
    if not inside or inside != list(range(inside[0], inside[-1] + 1)):
        raise ModelError(f"The pipeline cannot be cut at one `denoise` block: its blocks are {', '.join(names)}.")
    return {
        Stage.ENCODER: _blocks(blocks, names[: inside[0]]),
        Stage.DENOISER: _blocks(blocks, names[inside[0] : inside[-1] + 1]),
        Stage.DECODER: _blocks(blocks, names[inside[-1] + 1 :]),
    }


def join_blocks(stages: Iterable[Any]) -> Any:
    """Join the blocks of stages, for a process with more than one stage."""
    blocks = {name: block for stage in stages for name, block in stage.sub_blocks.items()}
    return SequentialPipelineBlocks.from_blocks_dict(blocks)


def branch_inputs(stage: Any) -> set[str]:
    """Return the names of the values by which blocks of a stage choose what to run, which need not be inputs."""
    inner = set().union(*(branch_inputs(block) for block in stage.sub_blocks.values()))
    return inner | {name for name in getattr(stage, "block_trigger_inputs", ()) if name}


def values_needed_later(
    values: Mapping[str, object], groups: Mapping[str, list[str]], later: Iterable[Any]
) -> dict[str, object]:
    """Return the values that later stages need.

    Args:
        values: All values by name.
        groups: The names of values in each group (`kwargs_type`) that blocks may take as a group.
        later: The blocks of the stages still to run.

    Returns:
        The values that later stages take as inputs, and `KWARGS_MAPPING`: their groups.
    """
    wanted: set[str] = set()
    for stage in later:
        # The values by which a stage chooses blocks need not be inputs.
        wanted |= branch_inputs(stage)
        for declared in stage.inputs:
            wanted.update([declared.name] if declared.name else groups.get(declared.kwargs_type, ()))
    kept = {name: value for name, value in values.items() if name in wanted}
    # A block adds a name to its group each time that it sets it; keep it once.
    mapping = {group: [name for name in dict.fromkeys(names) if name in kept] for group, names in groups.items()}
    return {**kept, KWARGS_MAPPING: mapping}


def _folder_of(spec: Any) -> Path:
    return Path(spec.pretrained_model_name_or_path) / (spec.subfolder or "")


def _is_absent(index: Mapping[str, object], name: str) -> bool:
    return index.get(name) in (None, [None, None])


def _blocks_class(found: Any, index: Mapping[str, object]) -> Any:
    named = getattr(diffusers, str(index.get("_blocks_class_name")), None)
    # A saved pipeline may name a base class without blocks of its own.
    return named if getattr(named, "block_classes", None) else getattr(diffusers, found.default_blocks_name)


def _blocks(blocks: Any, names: list[str]) -> Any:
    return SequentialPipelineBlocks.from_blocks_dict({name: blocks.sub_blocks[name] for name in names})
