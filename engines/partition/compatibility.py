"""Check that the files of a model fit the classes of its components, without reading weights.

Each component is made without weights from its configuration, and compared with the headers of its files.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
import transformers
from accelerate import init_empty_weights

from triptych.engines.model_options import DEFAULTS, ModelOptions
from triptych.engines.parameters.lora import LoraFile
from triptych.engines.parameters.serving_config import SERVING_CONFIG_NAME, load_index, load_serving_config
from triptych.engines.partition.blocks import load_modular_partition
from triptych.engines.partition.introspection import loaded_by
from triptych.engines.partition.strategy import PartitionStrategy, classic_class, lora_class, strategy_for
from triptych.engines.stages import ModelError, one_line
from triptych.engines.weights.adapters import Adapters, captured_warnings
from triptych.engines.weights.custom_code import custom_class, custom_file
from triptych.engines.weights.files import WeightFormat, component_files
from triptych.engines.weights.inspection import (
    ComponentEntry,
    Finding,
    TensorHeader,
    class_problem,
    component_entries,
    config_of,
    library_version_of,
    read_headers,
    summarize_names,
)

_LIBRARIES: Final[Mapping[str, Any]] = {"diffusers": diffusers, "transformers": transformers}
_DOWN: Final = ".lora_A.weight"
_UP: Final = ".lora_B.weight"

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of tensors by name."""


@dataclass(frozen=True)
class CompatibilityReport:
    """How the files of a model fit its classes.

    Attributes:
        findings: The problems that `weights.inspection` cannot find.
        needed: The names of the components that are loaded to serve the model.
        elements: The number of elements of the weights of each of them.
    """

    findings: tuple[Finding, ...] = ()
    needed: frozenset[str] = frozenset()
    elements: Mapping[str, int] = field(default_factory=dict)


def check_compatibility(
    model: Path,
    options: ModelOptions = DEFAULTS,
    loras: tuple[LoraFile, ...] = (),
    *,
    broken: frozenset[str] = frozenset(),
    say: Callable[[str], None] = lambda _: None,
) -> CompatibilityReport:
    """Check that the files of a model fit its classes.

    Args:
        model: The folder of the model.
        options: The options of the topology.
        loras: The adapters of the model.
        broken: The names of components whose files are known to be broken; they are skipped.
        say: Is called with the name of each component before it is checked.

    Returns:
        All findings; only the first if the index cannot be used.
    """
    # Otherwise each component has a progress bar.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    try:
        index = load_index(model)
    except ModelError as error:
        return CompatibilityReport((Finding("index", str(error)),))
    found: list[Finding] = []
    elements: dict[str, int] = {}
    shapes: dict[str, Shapes] = {}
    all_entries = component_entries(model, index, options)
    classes = {entry.name: _class_of(entry, options) for entry in all_entries}
    unknown = {name: problem for name, (_, problem) in classes.items() if problem}
    try:
        partition = strategy_for(model, options)
        needed, lacking = _needed(model, index, partition, options)
        found += lacking
        found += _config_findings(model, index, partition, options)
    except Exception as error:  # noqa: BLE001  two libraries may raise anything for an index; it is one finding
        # After a missing class, this error is only its consequence.
        why = f"The index of {model} cannot be followed: {type(error).__name__}: {one_line(error)}"
        found += [] if unknown else [Finding("index", str(error) if isinstance(error, ModelError) else why)]
        needed = frozenset(classes)
    for entry in all_entries:
        if entry.name not in needed or entry.name in broken or not entry.folder.is_dir():
            continue
        say(entry.name)
        cls, problem = classes[entry.name]
        if problem:
            found.append(Finding(entry.name, problem))
        elif not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
            found += _loaded(entry, cls)
        else:
            more, elements[entry.name], shapes[entry.name] = _compared(entry, cls, options)
            found += more
    found += _lora_findings(model, loras, shapes)
    return CompatibilityReport(tuple(found), needed, elements)


def empty_components(model: Path, options: ModelOptions, names: Collection[str]) -> dict[str, Any]:
    """Make components of a model without weights, in no time and memory.

    Args:
        model: The folder of the model.
        options: The options of the topology.
        names: The components, which `check_compatibility` has found no fault with.

    Returns:
        Those of them that are modules, by name.
    """
    entries = [entry for entry in component_entries(model, load_index(model), options) if entry.name in names]
    classes = {entry.name: _class_of(entry, options)[0] for entry in entries}
    return {
        entry.name: _empty(entry, classes[entry.name])
        for entry in entries
        if isinstance(classes[entry.name], type) and issubclass(classes[entry.name], diffusers.ModelMixin)
    }


def explain_missing_class(model: Path, options: ModelOptions, error: str) -> str:
    """Say which class is missing and what to do, if that is the cause of an error; else "".

    Args:
        model: The folder of the model.
        options: The options of the topology.
        error: The message of the error while loading.

    Raises:
        ModelError: The folder is not a model.
    """
    for entry in component_entries(model, load_index(model), options):
        problem = _class_of(entry, options)[1]
        if problem and (entry.class_name in error or (entry.library not in _LIBRARIES and entry.library in error)):
            return problem
    return ""


def difference(wanted: Shapes, optional: frozenset[str], there: Shapes) -> list[tuple[str, bool]]:
    """Return how the tensors of files differ from those of a model. Pure.

    Args:
        wanted: The tensors of the model.
        optional: The names of tensors that files need not have.
        there: The tensors of the files.

    Returns:
        Each difference, as the rest of a sentence, and whether it is fatal.
    """
    missing = sorted(wanted.keys() - optional - there.keys())
    others = sorted(there.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & there.keys() if tuple(wanted[name]) != tuple(there[name]))
    problems = []
    if missing:
        problems.append((f"lacks {len(missing)} of the {len(wanted)} weights of its class, such as {missing[0]}", True))
    if wrong:
        has, wants = list(there[wrong[0]]), list(wanted[wrong[0]])
        problems.append(
            (f"does not fit its config.json: {summarize_names(wrong)} has the shape {has} instead of {wants}", True)
        )
    if others:
        problems.append(
            (f"has weights that its class does not have and that are ignored: {summarize_names(others)}", False)
        )
    return problems


def lora_difference(tensors: Shapes, module: Shapes) -> str:
    """Say how an adapter does not fit a model; "" if it does. Pure.

    Args:
        tensors: The tensors of the adapter, with the names of peft: LAYER.lora_A.weight, LAYER.lora_B.weight.
        module: The tensors of the model.
    """
    matrices = [name for name in tensors if name.endswith((_DOWN, _UP))]
    lost = [name for name in matrices if not _fits(name, tensors[name], module)]
    if not lost:
        return ""
    return f"{len(lost)} of its {len(matrices)} matrices do not fit, such as {lost[0]}"


def _fits(name: str, shape: tuple[int, ...], module: Shapes) -> bool:
    base = module.get(f"{name.removesuffix(_DOWN).removesuffix(_UP)}.weight")
    if base is None or len(base) < 2:
        return False
    return shape[1] == base[1] if name.endswith(_DOWN) else shape[0] == base[0]


def _class_of(entry: ComponentEntry, options: ModelOptions) -> tuple[Any, str]:
    """Return the class of a component and "", or None and why there is none."""
    if file := custom_file(entry.folder, entry.library):
        try:
            return custom_class(file, entry.class_name, options), ""
        except ModelError as error:
            return None, str(error)
    module = _LIBRARIES.get(entry.library) or getattr(diffusers.pipelines, entry.library, None)
    version = getattr(_LIBRARIES.get(entry.library, diffusers), "__version__", "")
    try:
        found = getattr(module, entry.class_name, None)
    except (ImportError, RuntimeError) as error:
        return None, f"The {entry.name} is a {entry.class_name}, which cannot be imported: {error}"
    if found is None:  # only then, since `dir` of transformers takes a quarter of a second
        has = frozenset(name for name in dir(module) if name[:1].isupper()) if module is not None else frozenset[str]()
        return None, class_problem(entry, has, version, library_version_of(entry))
    if backends := getattr(found, "_backends", ()):
        missing = [name for name in backends if name not in _installed(found)]
        if missing or not hasattr(found, "from_pretrained"):
            return None, f"The {entry.name} is a {entry.class_name}, which needs {', '.join(missing or backends)}."
    return found, ""


def _installed(found: Any) -> frozenset[str]:
    # A class whose package is missing is a `DummyObject` that only raises; others with `_backends` are real.
    is_real = type(found).__name__ != "DummyObject"
    return frozenset(found._backends) if is_real else frozenset()


def _needed(
    model: Path, index: Mapping[str, object], partition: PartitionStrategy, options: ModelOptions
) -> tuple[frozenset[str], list[Finding]]:
    """Return the names of the components that serving loads, and a finding for each that the index does not have."""
    if partition is not PartitionStrategy.MODULAR:
        cls = classic_class(index, options)
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        wanted = set(loaded_by(cls))
        lacking = [each.name for each in parameters if each.default is each.empty and each.name not in index]
        named = cls.__name__
    else:
        split = load_modular_partition(model, options)
        pipeline = split.pipeline(split.blocks)
        wanted = set(pipeline.pretrained_component_names)
        lacking = [
            name
            for name in wanted
            if index.get(name) != [None, None]
            and pipeline.get_component_spec(name).pretrained_model_name_or_path is None
        ]
        named = split.pipeline_class.__name__
    task = f" for the task {options.task}" if options.task else ""
    return frozenset(wanted), [
        Finding("index", f"The index of {model} has no {name}, which {named} needs{task}.") for name in sorted(lacking)
    ]


def _config_findings(
    model: Path, index: Mapping[str, object], partition: PartitionStrategy, options: ModelOptions
) -> Iterator[Finding]:
    """Yield a finding for each name in the serving config that looks misspelt; the model is served without them."""
    if partition is PartitionStrategy.MODULAR:
        taken = {item.name for item in load_modular_partition(model, options).all_blocks.inputs if item.name}
    else:
        taken = set(inspect.signature(classic_class(index, options).__call__).parameters)
    for sentence in load_serving_config(model).misspellings(taken, model / SERVING_CONFIG_NAME):
        yield Finding("serving config", sentence, fatal=False)


def _loaded(entry: ComponentEntry, cls: Any) -> Iterator[Finding]:
    """Load a component without weights, and yield a finding if that fails."""
    try:
        with captured_warnings():
            cls.from_pretrained(str(entry.folder), local_files_only=True)
    except Exception as error:  # noqa: BLE001  two libraries may raise anything for a broken folder; it is one finding
        yield Finding(entry.name, f"The {entry.name} in {entry.folder} cannot be loaded: {one_line(error)}")


def _compared(entry: ComponentEntry, cls: Any, options: ModelOptions) -> tuple[list[Finding], int, Shapes]:
    """Compare the headers of a component's files with its class; returns findings, elements and shapes."""

    def finding(problem: str, *, fatal: bool = True) -> Finding:
        return Finding(entry.name, f"The {entry.name} in {entry.folder} {problem}.", fatal)

    try:
        files = component_files(entry.name, entry.folder, options)
        wanted, optional = _expected(entry, cls)
    except ModelError as error:
        return [Finding(entry.name, str(error))], 0, {}
    except Exception as error:  # noqa: BLE001  likewise
        return [finding(f"has a configuration that {entry.class_name} does not take: {one_line(error)}")], 0, {}
    elements = sum(math.prod(shape) for shape in wanted.values())
    if files.form is not WeightFormat.FOLDER or "quantization_config" in (config_of(entry.folder) or {}):
        return [], elements, wanted  # quantized weights and checkpoints have other tensors
    there, _ = read_headers(files)
    if issubclass(cls, transformers.PreTrainedModel):
        problems = _transformers_difference(entry, cls, there, wanted)
    else:
        renamed = there if files.index is not None else _renamed(entry, cls, there)
        problems = difference(wanted, optional, {name: tensor.shape for name, tensor in renamed.items()})
    return [finding(problem, fatal=fatal) for problem, fatal in problems], elements, wanted


def _expected(entry: ComponentEntry, cls: Any) -> tuple[Shapes, frozenset[str]]:
    """Return the shapes of a class's weights with a configuration, and the names that files need not have."""
    module = _empty(entry, cls)
    parameters = {name for name, _ in module.named_parameters()}
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return wanted, frozenset(wanted) - parameters


def _empty(entry: ComponentEntry, cls: Any) -> Any:
    with captured_warnings(), init_empty_weights():
        if issubclass(cls, transformers.PreTrainedModel):
            return cls(cls.config_class.from_pretrained(str(entry.folder)))
        return cls.from_config(cls.load_config(str(entry.folder)))


def _renamed(entry: ComponentEntry, cls: Any, there: Mapping[str, TensorHeader]) -> dict[str, TensorHeader]:
    """Return the tensors by the names that the present version of diffusers has for them."""
    rename = getattr(_empty(entry, cls), "_fix_state_dict_keys_on_load", None)
    renamed = dict(there)
    if rename is not None:
        rename(renamed)
    ignored = "|".join(getattr(cls, "_keys_to_ignore_on_load_unexpected", None) or ())
    return {name: tensor for name, tensor in renamed.items() if not (ignored and re.search(ignored, name))}


def _transformers_difference(
    entry: ComponentEntry, cls: Any, there: Mapping[str, TensorHeader], wanted: Shapes
) -> list[tuple[str, bool]]:
    """Return the differences that transformers reports, since it renames, ties and merges weights while loading."""
    weights = {name: torch.empty(tensor.shape, device="meta") for name, tensor in there.items()}
    with captured_warnings():
        _, report = cls.from_pretrained(
            None,
            config=cls.config_class.from_pretrained(str(entry.folder)),
            state_dict=weights,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    there_now = {name: wanted[name] for name in wanted.keys() - report["missing_keys"]}
    there_now |= {name: tuple(has) for name, has, _ in report["mismatched_keys"]}
    there_now |= dict.fromkeys(report["unexpected_keys"], ())
    return difference({**wanted, **dict.fromkeys(report["missing_keys"], ())}, frozenset(), there_now)


def _lora_findings(model: Path, loras: tuple[LoraFile, ...], shapes: Mapping[str, Shapes]) -> Iterator[Finding]:
    for lora in loras:
        where = f"LoRA {lora.name}"
        try:
            read = Adapters.read(model, (lora,), lora_class(load_index(model)))
        except ModelError as error:
            yield Finding(where, str(error))
            continue
        for component, tensors in read.shapes().items():
            problem = lora_difference(tensors, shapes[component]) if component in shapes else ""
            if problem:
                yield Finding(where, f"The LoRA {lora.path} does not fit the {component}: {problem}.")
