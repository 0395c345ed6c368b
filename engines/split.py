"""Split a Modular Diffusers pipeline in three by one rule, without any code for a family.

Each pipeline has exactly one block named `denoise` at its top. What comes before it is the encoder, the block
itself is the denoiser (it makes noise and timesteps too, so a scheduler's state never crosses), what comes after
it is the decoder. The inputs that a part declares are all that it needs of the parts before it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import diffusers
from diffusers.modular_pipelines.modular_pipeline import MODULAR_PIPELINE_MAPPING, SequentialPipelineBlocks
from diffusers.pipelines.auto_pipeline import _get_model

from engines.card import INDEX_NAMES, load_card, load_index
from engines.options import DEFAULTS, ModelOptions
from engines.panels import ModelError, Panel

KWARGS_MAPPING: Final = "kwargs_mapping"
"""The name in a state of the grouping of other names that some blocks ask for as a group."""
_SYNONYMS: Final = {"image2image": ("img2img", "image_conditioned"), "inpainting": ("image_conditioned_inpainting",)}


@dataclass(frozen=True)
class Split:
    """A pipeline, cut.

    Attributes:
        model: Its folder.
        pipeline_class: The class of its pipelines, a `diffusers.ModularPipeline`.
        index: What the pipelines are made with: `modular_config_dict` or `config_dict`, whichever the folder has.
        whole: All blocks of the pipeline, for every task.
        blocks: All blocks of the task, `SequentialPipelineBlocks`.
        parts: The blocks of each panel, likewise.
        outputs: Names of the results of the decoder, such as "images".
        required: Names of the inputs that make a request one of the task.
        task: As it was chosen, by the topology or the card.
    """

    model: Path
    pipeline_class: Any
    index: Mapping[str, dict[str, object]]
    whole: Any
    blocks: Any
    parts: Mapping[Panel, Any]
    outputs: tuple[str, ...]
    required: frozenset[str] = frozenset()
    task: str = ""

    def pipeline(self, blocks: Any) -> Any:
        """Make a pipeline of some of the blocks; its weights are not loaded yet.

        Raises:
            ModelError: The index names something that is no component.
        """
        try:
            # The class is that of the whole: it computes geometry, and blocks alone would lead to another one.
            return self.pipeline_class(blocks=blocks, pretrained_model_name_or_path=str(self.model), **self.index)
        except Exception as error:  # Whatever names in an index make diffusers raise, the user gets one sentence.
            raise ModelError(f"The index of {self.model} cannot be followed: {error}") from error


def load_split(model: Path, options: ModelOptions = DEFAULTS) -> Split:
    """Read what a model folder is, and cut its pipeline; loads no weights.

    Args:
        model: The folder.
        options: How it is cut.

    Raises:
        ModelError: It is no such folder, or its pipeline cannot be cut.
    """
    index = load_index(model)
    card = load_card(model, options.task)
    found = pipeline_class(index, model)
    whole = _blocks_class(found, index)()
    missing = {
        spec.name
        for spec in whole.expected_components
        if spec.default_creation_method == "from_pretrained" and _lacks(index, spec.name)
    }
    blocks = prune(whole, card.task, card.defaults, missing)
    parts = cut(blocks)
    made = parts[Panel.DECODER].intermediate_output_names
    outputs = tuple(name for name in whole.output_names if name in made) or tuple(made)
    kind = "modular_config_dict" if (model / INDEX_NAMES[0]).is_file() else "config_dict"
    return Split(model, found, {kind: index}, whole, blocks, parts, outputs, required(whole, card.task), card.task)


def pipeline_class(index: Mapping[str, object], model: Path) -> Any:
    """Find the modular pipeline for an index, which may name a classic one.

    Raises:
        ModelError: There is none.
    """
    found = modular_class(index)
    if found is None:
        raise ModelError(
            f"The model {model} is for {index['_class_name']}, which diffusers {diffusers.__version__} cannot run in"
            " parts (it has no modular pipeline for it)."
        )
    return found


def modular_class(index: Mapping[str, object]) -> Any | None:
    """Find the modular pipeline for an index, if there is one."""
    name = str(index["_class_name"])
    choose = MODULAR_PIPELINE_MAPPING.get(_get_model(name) or "")
    # Half of the families are not in that table, but they are all named alike.
    stem = name.removesuffix("Pipeline").removesuffix("Modular")
    stems = (stem, stem.replace("ImageToVideo", "Image2Video"), stem.replace("ImageToVideo", ""))
    names = [choose(index)] if choose else [f"{stem}ModularPipeline" for stem in stems]
    found = next((getattr(diffusers, name) for name in names if hasattr(diffusers, name)), None)
    return found if found is not None and found.default_blocks_name else None


def prune(
    blocks: Any, task: str, given: Mapping[str, object] | None = None, missing: Collection[str] = frozenset()
) -> Any:
    """Keep the blocks that a task runs, so that no panel loads weights for another one.

    Args:
        blocks: All blocks of a pipeline.
        task: A workflow of the pipeline, such as "text-to-image"; "" is the first that needs just a prompt; "any"
            keeps all.
        given: Inputs that each request has, and so can leave out the blocks that would compute them.
        missing: Components that the model goes without. A block that needs one of those is left out where an input
            that a request can give (the number of frames of a video) takes its place.

    Raises:
        ModelError: The pipeline has no such task.
    """
    triggers = _triggers(blocks, task)
    if not triggers:
        return blocks
    inputs = {**(given or {}), **triggers[0]}
    return _reopened(blocks, inputs, _without(blocks, inputs, blocks.get_execution_blocks(**inputs), missing))


def required(blocks: Any, task: str) -> frozenset[str]:
    """Names of the inputs without which a request is for another task.

    Args:
        blocks: All blocks of a pipeline, which mostly declare these as optional, since other tasks do without.
        task: As in `prune`.

    Raises:
        ModelError: The pipeline has no such task.
    """
    triggers = _triggers(blocks, task)
    needed = [{name for name, value in inputs.items() if value is True} for inputs in triggers]
    return frozenset(set.intersection(*needed)) if needed else frozenset()


def _triggers(blocks: Any, task: str) -> list[dict[str, object]]:
    """Inputs that lead to the blocks of a task: one or several sets of them, or none where all blocks are meant."""
    workflows: dict[str, Any] | None = getattr(blocks, "_workflow_map", None)
    if workflows is None or task == "any":
        return []
    if task:
        wanted = task.replace("-to-", "2")
        name = next((name for name in (task, wanted, *_SYNONYMS.get(wanted, ())) if name in workflows), None)
        if name is None:
            raise ModelError(f'The task "{task}" is not one of this pipeline: choose of {", ".join(workflows)}, any.')
    else:
        name = next((name for name in workflows if workflows[name] == {"prompt": True}), next(iter(workflows)))
    inputs = workflows[name]
    return list(inputs) if isinstance(inputs, tuple) else [inputs]


def _reopened(blocks: Any, inputs: Mapping[str, object], pruned: Any) -> Any:
    """Let a request still give what a block would make for it, such as the number of frames."""
    kept = dict(pruned.sub_blocks)
    made = set(pruned.intermediate_output_names) - set(pruned.input_names) - inputs.keys()
    for name in made & set(blocks.input_names):
        try:
            others = blocks.get_execution_blocks(**inputs, **{name: True}).sub_blocks.keys()
        except ValueError:  # So a family says that it does not take this beside the others.
            continue
        if others < kept.keys():
            # The whole of them chooses anew for each request.
            kept |= {gone: blocks.sub_blocks[gone] for gone in kept.keys() - others if gone in blocks.sub_blocks}
    return SequentialPipelineBlocks.from_blocks_dict(kept)


def _without(blocks: Any, inputs: Mapping[str, object], pruned: Any, missing: Collection[str]) -> Any:
    needed = set(pruned.component_names)
    if not needed & set(missing):
        return pruned
    for declared in blocks.inputs:
        if declared.name and declared.name not in inputs:
            other = blocks.get_execution_blocks(**inputs, **{declared.name: True})
            # More of the same task would need more components, not less.
            if set(other.component_names) < needed and not set(other.component_names) & set(missing):
                return other
    return pruned


def cut(blocks: Any) -> dict[Panel, Any]:
    """Cut blocks at the one that is named `denoise`.

    Raises:
        ModelError: There is not exactly one.
    """
    names = list(blocks.sub_blocks)
    inside = [index for index, name in enumerate(names) if name.split(".")[0] == "denoise"]
    if not inside or inside != list(range(inside[0], inside[-1] + 1)):
        raise ModelError(f"The pipeline cannot be cut at one `denoise` block: its blocks are {', '.join(names)}.")
    return {
        Panel.ENCODER: _part(blocks, names[: inside[0]]),
        Panel.DENOISER: _part(blocks, names[inside[0] : inside[-1] + 1]),
        Panel.DECODER: _part(blocks, names[inside[-1] + 1 :]),
    }


def joined(parts: Iterable[Any]) -> Any:
    """Put parts together again, for a process that has more than one panel."""
    blocks = {name: block for part in parts for name, block in part.sub_blocks.items()}
    return SequentialPipelineBlocks.from_blocks_dict(blocks)


def switches(part: Any) -> set[str]:
    """Names that blocks of a part look at to choose what to run, though none of them may take it."""
    inner = set().union(*(switches(block) for block in part.sub_blocks.values()))
    return inner | {name for name in getattr(part, "block_trigger_inputs", ()) if name}


def crossing(values: Mapping[str, object], groups: Mapping[str, list[str]], later: Iterable[Any]) -> dict[str, object]:
    """Choose what later parts need of a state.

    Args:
        values: All values of the state, by name.
        groups: Names of values by the group (`kwargs_type`) that blocks may ask for them as.
        later: The parts still to run.

    Returns:
        The values that later parts take as inputs, and `KWARGS_MAPPING`: the groups of those.
    """
    wanted: set[str] = set()
    for part in later:
        for declared in part.inputs:
            wanted.update([declared.name] if declared.name else groups.get(declared.kwargs_type, ()))
    kept = {name: value for name, value in values.items() if name in wanted}
    # A block adds a name to its group each time it sets it; once is enough.
    mapping = {group: [name for name in dict.fromkeys(names) if name in kept] for group, names in groups.items()}
    return {**kept, KWARGS_MAPPING: mapping}


def _lacks(index: Mapping[str, object], name: str) -> bool:
    return index.get(name) in (None, [None, None])


def _blocks_class(found: Any, index: Mapping[str, object]) -> Any:
    named = getattr(diffusers, str(index.get("_blocks_class_name")), None)
    # A saved pipeline may name a base class, whose blocks were put together by hand.
    return named if getattr(named, "block_classes", None) else getattr(diffusers, found.default_blocks_name)


def _part(blocks: Any, names: list[str]) -> Any:
    return SequentialPipelineBlocks.from_blocks_dict({name: blocks.sub_blocks[name] for name in names})
