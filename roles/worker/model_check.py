"""Check a model for `triptych check FILE --model`: its files, its classes, and one tiny request in this process.

Importing this module imports no torch, so that findings about files appear at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

from triptych.actors import Component, Model, StartError
from triptych.actors.errors import describe
from triptych.actors.topology import ModelProblem, ModelReport
from triptych.engines.memory.arena import available_memory
from triptych.engines.stages import ModelError, Stage
from triptych.engines.weights.inspection import Finding, inspect_files
from triptych.engines.weights.read_ahead import size_text
from triptych.roles.worker.model_loading import describe_model, lora_files, model_options

if TYPE_CHECKING:
    from triptych.engines.partition.compatibility import CompatibilityReport
    from triptych.engines.pipelines.pipeline import StagePipeline

_BYTES: Final = {"float32": 4}
_DEFAULT_BYTES: Final = 2
_SHARE: Final = 0.8
"""Share of the free memory that weights may take: the rest is for activations and other processes."""
_TRIES: Final = ((64, True), (256, True), (256, False))
"""Pixels of a side of a dry request, and whether it has the fewest steps possible: some models need more."""


def check_model(
    model: Model, components: Sequence[Component], *, dry_run: bool = True, say: Callable[[str], None] = print
) -> ModelReport:
    """Check a model before it is served, and report all problems that were found.

    Args:
        model: A model of a topology.
        components: The instances that serve it.
        dry_run: Whether to load it and run one tiny request, unless a problem prevents that.
        say: Called with a description of each step.
    """
    began = time.monotonic()
    seconds: dict[str, float] = {}

    def lap(part: str) -> None:
        seconds[part] = time.monotonic() - began - sum(seconds.values())

    options, loras = model_options(model), lora_files(model)
    say("reading configuration and headers of weights")
    found = inspect_files(model.path, options, loras)
    lap("files")
    if any(finding.fatal and finding.where == "index" for finding in found):  # nothing else can be checked
        return ModelReport(model.name, str(model.path), "", _problems(found), "", seconds)
    say("importing torch and diffusers")
    from triptych.engines.partition.compatibility import check_compatibility

    lap("import")
    broken = frozenset(finding.where for finding in found if finding.fatal)
    fitted = check_compatibility(
        model.path, options, loras, broken=broken, say=lambda name: say(f"comparing {name} with its class")
    )
    found = _relevant([*found, *fitted.findings], fitted)
    lap("classes")
    sentence = ""
    if not any(finding.fatal for finding in found):
        sentence, problem = describe_model(model)
        found += [Finding("index", problem)] if problem else []
        found += _step_cache_findings(model, fitted)
    lap("pipeline")
    told = ""
    if not any(finding.fatal for finding in found):
        told, failed = _dry_run(model, components, fitted, say) if dry_run else ("No dry request was made.", None)
        found += [failed] if failed else []
        lap("dry run")
    return ModelReport(model.name, str(model.path), sentence, _problems(found), told, seconds)


def _problems(found: Sequence[Finding]) -> tuple[ModelProblem, ...]:
    return tuple(ModelProblem(finding.where, finding.problem, finding.fatal) for finding in found)


def _relevant(found: Sequence[Finding], fitted: CompatibilityReport) -> list[Finding]:
    """Remove duplicates; a finding about a component that is not loaded is not fatal."""
    import msgspec

    matter = []
    for finding in dict.fromkeys(found):
        of_model = finding.where in ("index", "serving config") or "LoRA" in finding.where
        is_ours = of_model or finding.where in fitted.needed
        matter.append(finding if is_ours or not fitted.needed else msgspec.structs.replace(finding, fatal=False))
    return matter


def _step_cache_findings(model: Model, fitted: CompatibilityReport) -> list[Finding]:
    """Install the step cache of the topology on denoisers without weights; return the problem, if any."""
    if not model.step_cache:
        return []
    from triptych.engines.partition.compatibility import empty_components
    from triptych.engines.steps.step_caches import install

    try:
        install(empty_components(model.path, model_options(model), fitted.needed), model.step_cache)
    except ModelError as error:
        return [Finding("cache", str(error))]
    return []


def _dry_run(
    model: Model, components: Sequence[Component], fitted: CompatibilityReport, say: Callable[[str], None]
) -> tuple[str, Finding | None]:
    """Load the model as its roles do, and run one tiny request; return its result, and the problem or None."""
    instances = {component.kind: component for component in reversed(components)}
    needed = sum(
        count * max(_BYTES.get(each.dtype, _DEFAULT_BYTES) for each in instances.values())
        for count in fitted.elements.values()
    )
    free = _free_bytes(instances.values())
    if needed > _SHARE * free:
        return f"No dry request was made: the weights take {size_text(needed)}, {size_text(free)} are free.", None
    began = time.monotonic()
    try:
        stages = _load(model, instances.values(), say)
    except Exception as error:  # noqa: BLE001  every error is a finding of the check
        in_words = isinstance(error, (ModelError, StartError))
        return "", Finding("dry run", str(error) if in_words else f"The model cannot be loaded: {describe(error)}")
    loaded_s = time.monotonic() - began
    for side, minimal_steps in _TRIES:
        began = time.monotonic()
        at, failed = _request(model, stages, side, say, minimal_steps=minimal_steps)
        if failed is None:
            seconds = time.monotonic() - began
            failed = _cached_request(model, stages, side, say, minimal_steps=minimal_steps)
            loading = f"loading the {size_text(needed)} took {loaded_s:.1f} s"
            return f"A dry request ({at}) took {seconds:.1f} s; {loading}.", failed
        if failed.fatal and side == _TRIES[-1][0]:
            break
    return "", failed


def _load(model: Model, instances: Iterable[Component], say: Callable[[str], None]) -> dict[Stage, StagePipeline]:
    from triptych.roles.worker import devices
    from triptych.roles.worker.model_loading import load_stages

    stages: dict[Stage, StagePipeline] = {}
    for component in instances:
        say(f"loading the {component.kind}")
        pipeline = load_stages(component, model, devices.usable_device(component))
        stages |= dict.fromkeys(pipeline.stages, pipeline)
    return stages


def _request(
    model: Model, stages: dict[Stage, StagePipeline], side: int, say: Callable[[str], None], *, minimal_steps: bool
) -> tuple[str, Finding | None]:
    """Run a request; return its integer inputs as text, and the problem or None."""
    from triptych.engines.pipelines.dry_run import run
    from triptych.roles.worker import devices

    at = ""

    def seen(stage: str) -> None:
        nonlocal at
        at = stage
        say(f"a dry request: {stage}")

    inputs = _tiny_inputs(model, stages, side, minimal_steps=minimal_steps)
    told = ", ".join(f"{name}={value}" for name, value in sorted(inputs.items()) if isinstance(value, int))
    try:
        run(stages, inputs, seen)
    except Exception as error:  # noqa: BLE001  every error is a finding of the check
        sentence = f"A dry request ({told}) failed in the {at}: {describe(error)}"
        return told, Finding("dry run", sentence, fatal=not devices.is_invalid_request(error))
    return told, None


def _cached_request(
    model: Model, stages: dict[Stage, StagePipeline], side: int, say: Callable[[str], None], *, minimal_steps: bool
) -> Finding | None:
    """Run a request in which the step cache must reuse something, if there is one; return the problem or None."""
    from triptych.engines.pipelines.dry_run import FEWEST_CACHED, step_cache_problem

    if not model.step_cache:
        return None
    say("a dry request: the step cache")
    inputs = _tiny_inputs(model, stages, side, minimal_steps=minimal_steps, fewest=FEWEST_CACHED)
    problem = step_cache_problem(stages, inputs)
    return Finding("cache", problem) if problem else None


def _tiny_inputs(model: Model, stages: dict[Stage, StagePipeline], side: int, **steps: Any) -> dict[str, object]:
    from triptych.engines.parameters.serving_config import load_serving_config
    from triptych.engines.pipelines.dry_run import tiny_inputs

    encoder = stages[Stage.ENCODER]
    serving_config = load_serving_config(model.path, model_options(model).task)
    return tiny_inputs(encoder.signature, serving_config, side, alpha=encoder.alpha, **steps)


def _free_bytes(instances: Iterable[Component]) -> int:
    """Return the free bytes of the devices that the instances use."""
    devices = {component.device for component in instances}
    if devices == {"cpu"}:
        return available_memory()
    import torch

    gpus = {torch.device(name).index or 0 for name in devices if name != "cpu"}
    return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus) if torch.cuda.is_available() else 0
