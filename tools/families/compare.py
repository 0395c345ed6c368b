"""Run one request disaggregated and with diffusers alone, and compare the results bit by bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import diffusers
import numpy as np
import torch

from triptych.engines.parameters.media import SAMPLING_RATE
from triptych.engines.parameters.serving_config import SERVING_CONFIG_NAME
from triptych.engines.partition.blocks import KWARGS_MAPPING
from triptych.engines.pipelines.modular import IP_ADAPTER_FOLDER
from triptych.tools.families.cases import PROMPT, Case
from triptych.tools.families.rows import blocks_of
from triptych.tools.families.stage_processes import StageProcesses
from triptych.tools.make_model import make_model

SEED: Final = 11


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison.

    Attributes:
        identical: Whether every output of the whole pipeline is the same, bit for bit.
        max_abs_diff: The largest difference between two values; None where shapes differ.
        outputs: The shapes of what was compared, by name.
        crossed: Kinds of what crossed to the denoiser and to the decoder, by name.
    """

    identical: bool
    max_abs_diff: float | None
    outputs: dict[str, list[int]]
    crossed: tuple[dict[str, str], dict[str, str]] = field(default=({}, {}))


def compare(case: Case, folder: Path, processes: StageProcesses) -> Comparison:
    """Make the model of a case, run its request both ways, and compare.

    Args:
        case: The request.
        folder: Where the model is made; an empty folder.
        processes: The three processes.

    Raises:
        StageError: A stage failed.
        Exception: Whatever the whole pipeline raises.
    """
    make_model(folder, case.family, progress=False)
    _set_task(folder, case.task)
    inputs = {"prompt": PROMPT, **case.inputs}
    expected = run_reference(case.pipeline, folder, {**_implied(case), **inputs})
    made, answers = processes.run(folder, inputs, SEED)
    made = {name: value for name, value in made.items() if name != SAMPLING_RATE or name in expected}
    shapes = {name: shape(value) for name, value in made.items()}
    found = [difference(value, expected.get(name)) for name, value in made.items()]
    worst = None if None in found else max((value for value in found if value is not None), default=None)
    same = bool(made) and all(identical(value, expected.get(name)) for name, value in made.items())
    crossed = (kinds(answers[0]["state"]), kinds(answers[1]["state"]))
    return Comparison(same, worst, shapes, crossed)


def run_reference(pipeline: str, folder: Path, inputs: dict[str, Any]) -> dict[str, Any]:
    """Run a request with diffusers alone: one pipeline, its own blocks, its own loading."""
    pipe = getattr(diffusers, pipeline)(pretrained_model_name_or_path=str(folder))
    pipe.load_components(dtype=torch.float32)
    if "ip_adapter_image" in inputs:
        (adapter,) = (folder / IP_ADAPTER_FOLDER).iterdir()
        pipe.load_ip_adapter(str(folder), subfolder=IP_ADAPTER_FOLDER, weight_name=adapter.name)
    _hide_bars(pipe._blocks)
    if "generator" in pipe.blocks.input_names:
        inputs = {**inputs, "generator": torch.Generator("cpu").manual_seed(SEED)}
    values: dict[str, Any] = pipe(**inputs).values
    return values


def _implied(case: Case) -> dict[str, Any]:
    # What the task of a serving config says already, such as that there is sound, must be said to the whole pipeline.
    workflows = blocks_of(case.pipeline)._workflow_map or {}
    implied = workflows.get(case.task, {})
    return dict(implied[0] if isinstance(implied, tuple) else implied)


def _hide_bars(block: Any) -> None:
    # The setting of a pipeline does not reach its inner loops.
    if hasattr(block, "set_progress_bar_config"):
        block.set_progress_bar_config(disable=True)
    for inner in block.sub_blocks.values():
        _hide_bars(inner)


def arrays(value: Any) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the arrays of a value: of images, arrays, tensors, and lists of them."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from arrays(item)
    elif isinstance(value, torch.Tensor):
        yield value.detach().float().numpy()
    elif value is not None:
        yield np.asarray(value)


def identical(left: Any, right: Any) -> bool:
    """Whether two values are the same, bit for bit."""
    ours, theirs = ([(item.shape, item.dtype, item.tobytes()) for item in arrays(value)] for value in (left, right))
    return bool(ours) and ours == theirs


def difference(left: Any, right: Any) -> float | None:
    """Return the largest difference between two values; None if their shapes differ."""
    pairs = list(arrays(left)), list(arrays(right))
    if [a.shape for a in pairs[0]] != [b.shape for b in pairs[1]]:
        return None
    found = [np.abs(a.astype(np.float64) - b.astype(np.float64)).max(initial=0) for a, b in zip(*pairs, strict=True)]
    return float(max(found, default=0.0))


def shape(value: Any) -> list[int]:
    """Return the shape of a value; lists count as dimensions."""
    if isinstance(value, (list, tuple)):
        return [len(value), *(shape(value[0]) if value else [])]
    return [int(size) for size in np.asarray(value).shape]


def kinds(state: dict[str, Any]) -> dict[str, str]:
    """Return the kind of each value that is not None, by name."""
    return {name: kind(value) for name, value in sorted(state.items()) if value is not None and name != KWARGS_MAPPING}


def kind(value: object) -> str:
    """Return the kind of a value in a word or two."""
    if isinstance(value, (list, tuple)):
        inner = sorted({kind(item) for item in value})
        return f"{type(value).__name__} of {' or '.join(inner)}" if inner else type(value).__name__
    return {"ndarray": "array", "Tensor": "tensor"}.get(type(value).__name__, type(value).__name__.lower())


def _set_task(folder: Path, task: str) -> None:
    path = folder / SERVING_CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "task": task}))
