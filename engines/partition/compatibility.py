"""Hold the files of a model against the classes of its components, without reading weights.

Each model is made without weights from its configuration, and the headers of its files say what would be put into it.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
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
from triptych.engines.stages import ModelError
from triptych.engines.weights.adapters import Adapters, captured_warnings
from triptych.engines.weights.custom_code import custom_class, custom_file
from triptych.engines.weights.files import WeightFormat, component_files
from triptych.engines.weights.inspection import (
    Entry,
    Finding,
    Tensor,
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
"""Of tensors, by name."""


@dataclass(frozen=True)
class CompatibilityReport:
    """How well the files of a model fit its classes.

    Attributes:
        findings: What is wrong, as far as `engines.inspection` cannot say it.
        needed: Names of the components that are loaded to serve the model.
        elements: How many numbers the weights of each of those are.
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
    """Hold a model's files against its classes.

    Args:
        model: Its folder.
        options: How it is read and cut.
        loras: Its adapters.
        broken: Names of components whose files are known to be no good; they are left alone.
        say: Called with the name of each component before it is looked at.

    Returns:
        Everything that was found; the first thing alone where the index itself cannot be followed.
    """
    # Bars of progress would be drawn for each component.
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
        route = strategy_for(model, options)
        needed, lacking = _needed(model, index, route, options)
        found += lacking
        found += _config_findings(model, index, route, options)
    except Exception as error:  # noqa: BLE001  whatever an index makes two libraries raise is one finding
        # A class that is not there makes whatever comes after it fail as well.
        why = f"The index of {model} cannot be followed: {type(error).__name__}: {_line(error)}"
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


def explain_missing_class(model: Path, options: ModelOptions, error: str) -> str:
    """Say what it would take to load a component whose class is not there; "" where that is not what an error is about.

    Args:
        model: Its folder.
        options: How it is read.
        error: What loading it has ended with.

    Raises:
        ModelError: The folder is no model.
    """
    for entry in component_entries(model, load_index(model), options):
        problem = _class_of(entry, options)[1]
        if problem and (entry.class_name in error or (entry.library not in _LIBRARIES and entry.library in error)):
            return problem
    return ""


def difference(wanted: Shapes, optional: frozenset[str], there: Shapes) -> list[tuple[str, bool]]:
    """Say how the tensors of files differ from those of a model. Pure.

    Args:
        wanted: Those of the model.
        optional: Names among them that files may lack.
        there: Those of the files.

    Returns:
        Rests of sentences, and for each whether the model cannot be served so.
    """
    missing = sorted(wanted.keys() - optional - there.keys())
    others = sorted(there.keys() - wanted.keys())
    wrong = sorted(name for name in wanted.keys() & there.keys() if tuple(wanted[name]) != tuple(there[name]))
    said = []
    if missing:
        said.append((f"lacks {len(missing)} of the {len(wanted)} weights of its class, {missing[0]} for one", True))
    if wrong:
        has, wants = list(there[wrong[0]]), list(wanted[wrong[0]])
        said.append(
            (f"does not fit its config.json: {summarize_names(wrong)} has the shape {has} in place of {wants}", True)
        )
    if others:
        said.append(
            (f"has weights that its class does not know and that are left out: {summarize_names(others)}", False)
        )
    return said


def lora_difference(tensors: Shapes, module: Shapes) -> str:
    """Say how an adapter does not fit a model; "" where it does. Pure.

    Args:
        tensors: Of the adapter, in the names of peft: PLACE.lora_A.weight, PLACE.lora_B.weight.
        module: Of the model.
    """
    places = [name for name in tensors if name.endswith((_DOWN, _UP))]
    lost = [name for name in places if not _has_place(name, tensors[name], module)]
    if not lost:
        return ""
    return f"{len(lost)} of its {len(places)} matrices find no place, {lost[0]} for one"


def _has_place(name: str, shape: tuple[int, ...], module: Shapes) -> bool:
    base = module.get(f"{name.removesuffix(_DOWN).removesuffix(_UP)}.weight")
    if base is None or len(base) < 2:
        return False
    return shape[1] == base[1] if name.endswith(_DOWN) else shape[0] == base[0]


def _class_of(entry: Entry, options: ModelOptions) -> tuple[Any, str]:
    """Find the class of a component; returns it and "", or None and why there is none."""
    if file := custom_file(entry.folder, entry.library):
        try:
            return custom_class(file, entry.class_name, options), ""
        except ModelError as error:
            return None, str(error)
    module = _LIBRARIES.get(entry.library) or getattr(diffusers.pipelines, entry.library, None)
    version = getattr(_LIBRARIES.get(entry.library, diffusers), "__version__", "")
    has = frozenset(name for name in dir(module) if name[:1].isupper()) if module is not None else frozenset[str]()
    try:
        found = getattr(module, entry.class_name, None)
    except (ImportError, RuntimeError) as error:
        return None, f"The {entry.name} is a {entry.class_name}, which cannot be imported: {error}"
    if found is None:
        return None, class_problem(entry, has, version, library_version_of(entry))
    if backends := getattr(found, "_backends", ()):
        missing = [name for name in backends if name not in _installed(found)]
        if missing or not hasattr(found, "from_pretrained"):
            return None, f"The {entry.name} is a {entry.class_name}, which needs {', '.join(missing or backends)}."
    return found, ""


def _installed(found: Any) -> frozenset[str]:
    # A class stands for one whose package is absent only where it is made of nothing else than that message.
    is_real = type(found).__name__ != "DummyObject"
    return frozenset(found._backends) if is_real else frozenset()


def _needed(
    model: Path, index: Mapping[str, object], route: PartitionStrategy, options: ModelOptions
) -> tuple[frozenset[str], list[Finding]]:
    """Names of the components that serving loads, and a finding for each that the index lacks."""
    if route is not PartitionStrategy.MODULAR:
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
    model: Path, index: Mapping[str, object], route: PartitionStrategy, options: ModelOptions
) -> Iterator[Finding]:
    """Find names in the serving config that are most likely misspelt; the model is served without them."""
    if route is PartitionStrategy.MODULAR:
        taken = {item.name for item in load_modular_partition(model, options).whole.inputs if item.name}
    else:
        taken = set(inspect.signature(classic_class(index, options).__call__).parameters)
    for sentence in load_serving_config(model).misspellings(taken, model / SERVING_CONFIG_NAME):
        yield Finding("card", sentence, fatal=False)


def _loaded(entry: Entry, cls: Any) -> Iterator[Finding]:
    """Read what has no weights, as serving does."""
    try:
        with captured_warnings():
            cls.from_pretrained(str(entry.folder), local_files_only=True)
    except Exception as error:  # noqa: BLE001  whatever a broken folder makes two libraries raise is one finding
        yield Finding(entry.name, f"The {entry.name} in {entry.folder} cannot be loaded: {_line(error)}")


def _compared(entry: Entry, cls: Any, options: ModelOptions) -> tuple[list[Finding], int, Shapes]:
    """Hold the headers of a component's files against its class; returns the numbers and shapes of its weights too."""

    def finding(problem: str, *, fatal: bool = True) -> Finding:
        return Finding(entry.name, f"The {entry.name} in {entry.folder} {problem}.", fatal)

    try:
        files = component_files(entry.name, entry.folder, options)
        wanted, optional = _expected(entry, cls)
    except ModelError as error:
        return [Finding(entry.name, str(error))], 0, {}
    except Exception as error:  # noqa: BLE001  likewise
        return [finding(f"has a configuration that {entry.class_name} does not take: {_line(error)}")], 0, {}
    elements = sum(math.prod(shape) for shape in wanted.values())
    if files.form is not WeightFormat.FOLDER or "quantization_config" in (config_of(entry.folder) or {}):
        return [], elements, wanted  # What quantized weights look like, or where a checkpoint has them, others know.
    there, _ = read_headers(files)
    if issubclass(cls, transformers.PreTrainedModel):
        said = _transformers_difference(entry, cls, there, wanted)
    else:
        renamed = there if files.index is not None else _renamed(entry, cls, there)
        said = difference(wanted, optional, {name: tensor.shape for name, tensor in renamed.items()})
    return [finding(problem, fatal=fatal) for problem, fatal in said], elements, wanted


def _expected(entry: Entry, cls: Any) -> tuple[Shapes, frozenset[str]]:
    """The shapes of the weights that a class has with a configuration, and the names of those that files may lack."""
    module = _empty(entry, cls)
    parameters = {name for name, _ in module.named_parameters()}
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return wanted, frozenset(wanted) - parameters


def _empty(entry: Entry, cls: Any) -> Any:
    with captured_warnings(), init_empty_weights():
        if issubclass(cls, transformers.PreTrainedModel):
            return cls(cls.config_class.from_pretrained(str(entry.folder)))
        return cls.from_config(cls.load_config(str(entry.folder)))


def _renamed(entry: Entry, cls: Any, there: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that diffusers has for them today."""
    rename = getattr(_empty(entry, cls), "_fix_state_dict_keys_on_load", None)
    renamed = dict(there)
    if rename is not None:
        rename(renamed)
    ignored = "|".join(getattr(cls, "_keys_to_ignore_on_load_unexpected", None) or ())
    return {name: tensor for name, tensor in renamed.items() if not (ignored and re.search(ignored, name))}


def _transformers_difference(
    entry: Entry, cls: Any, there: Mapping[str, Tensor], wanted: Shapes
) -> list[tuple[str, bool]]:
    """The same by the library itself, which renames, ties and merges weights while it reads them."""
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


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
