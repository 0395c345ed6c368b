"""Which model takes which step cache, and whether requests that take turns are those alone."""

from __future__ import annotations

import gc
import importlib.util
import json
import tempfile
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import diffusers
import msgspec
import torch
from torch.utils import _pytree as pytree

from triptych.engines.model_options import ModelOptions
from triptych.engines.parameters.serving_config import load_index, load_serving_config
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import ModelError, Stage, one_line
from triptych.engines.steps.denoising import Denoising
from triptych.tools.families.cases import PROMPT, Case, cases
from triptych.tools.families.stage_processes import CPU
from triptych.tools.make_model import Family, make_model

RATIOS: Final = "ratios=1.0 1.02 1.01 0.99 1.0 1.0 0.99 1.0"
CACHES: Final = {
    "first_block": "first_block:0.3",
    "magcache": f"magcache:0.3,{RATIOS}",
    "taylorseer": "taylorseer",
    "taylorseer, lite": "taylorseer:lite=true",
    "pab": "pab:cross_interval=3",
    "faster": "faster",
}
"""The caches of the columns; what they make of random weights does not matter."""
STEPS: Final = (8, 6)
"""The number of steps of the two requests, where a request can set it."""
_CLASSIC: Final = (Family.PIXART, Family.SANA, Family.CHROMA, Family.COGVIDEOX, Family.GLM_IMAGE, Family.KANDINSKY5)


class CacheRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A model with a cache.

    Attributes:
        family: The name of the tiny model.
        pipeline: Its class.
        cache: The cache.
        why: Why the model does not take it, or why the row was not run.
        reused: The part of the calls of cached layers that were not computed.
        identical: Whether two requests that take turns have the bits that each has alone.
        off_identical: Whether a request without the cache, beside one with it, has the bits that it has without one.
        freed: Whether nothing was kept for the requests when they had ended.
    """

    family: str
    pipeline: str = ""
    cache: str
    why: str = ""
    reused: float = 0.0
    identical: bool | None = None
    off_identical: bool | None = None
    freed: bool | None = None

    @property
    def key(self) -> str:
        """The name of the row."""
        return f"{self.family}:{self.cache}"

    @property
    def bad(self) -> bool:
        """Whether it ran, and is not what is promised."""
        return False in (self.identical, self.off_identical, self.freed)

    @property
    def cell(self) -> str:
        """What the table says."""
        if self.bad:
            return "wrong"
        if self.identical is None:
            return "-"
        return f"{self.reused:.0%}" if self.reused else "nothing to reuse"


def names() -> list[str]:
    """Return the names of the tiny models that can run here."""
    return [*(case.family.value for case in _cases().values()), *(family.value for family in _CLASSIC)]


def read_records(path: Path) -> dict[str, CacheRecord]:
    """Return the rows of a file by their keys; none where there is no such file."""
    lines = path.read_text().splitlines() if path.is_file() else []
    records = [msgspec.json.decode(line, type=CacheRecord) for line in lines]
    return {record.key: record for record in records}


def append_record(path: Path, record: CacheRecord) -> None:
    """Add a row to a file."""
    with path.open("a") as file:
        file.write(f"{msgspec.json.encode(record).decode()}\n")


def run(chosen: Sequence[str], known: Collection[str]) -> Iterator[CacheRecord]:
    """Run the models of some names with each cache.

    Args:
        chosen: As `names` has them.
        known: The keys of rows that need not run.
    """
    for name in chosen:
        if all(f"{name}:{cache}" in known for cache in CACHES):
            continue
        with tempfile.TemporaryDirectory(prefix="triptych-cache-") as folder:
            make_model(Path(folder), Family(name), progress=False)
            case = _cases().get(name)
            if case is not None:
                config = Path(folder, "triptych.json")
                config.write_text(json.dumps({**json.loads(config.read_text()), "task": case.task}))
            pipeline = str(load_index(Path(folder))["_class_name"])
            for cache, text in CACHES.items():
                if f"{name}:{cache}" in known:
                    continue
                try:
                    record = _compare(Path(folder), text, case)
                except Exception as error:  # noqa: BLE001 - what the model does not take is the reason of the row
                    why = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {one_line(error)}"
                    record = CacheRecord(family=name, cache=cache, why=why)
                yield msgspec.structs.replace(record, family=name, pipeline=pipeline, cache=cache)


def markdown(records: Sequence[CacheRecord]) -> str:
    """Return the table of `docs/step-caches.md`."""
    by_family: dict[str, dict[str, CacheRecord]] = {}
    for record in records:
        by_family.setdefault(record.family, {})[record.cache] = record
    lines = [
        "Made by `python -m triptych.tools.families caches --markdown docs/step-caches.md` on a CPU, in float32, with"
        f" diffusers {diffusers.__version__} and torch {torch.__version__}, on tiny models with random weights: two"
        f" requests of {STEPS[0]} and {STEPS[1]} steps, where the pipeline lets a request choose.",
        "",
        "A number is the part of the calls of cached layers that was reused; there, requests that take turns have the"
        " same bytes as alone, and so has a request with `cache = false` beside one with the cache. It says nothing of"
        ' speed or of how an image changes. "-": the model does not take the cache, and `triptych check` says why.',
        "",
        f"| model | pipeline | {' | '.join(CACHES)} |",
        f"|{' --- |' * (len(CACHES) + 2)}",
    ]
    for family, found in by_family.items():
        cells = [found[cache].cell if cache in found else "" for cache in CACHES]
        lines.append(f"| {family} | `{next(iter(found.values())).pipeline}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cases() -> dict[str, Case]:
    """Return the first case of each model whose packages are installed."""
    found: dict[str, Case] = {}
    for case in cases():
        if all(importlib.util.find_spec(package) for package in case.needs):
            found.setdefault(case.family.value, case)
    return found


def _compare(model: Path, text: str, case: Case | None) -> CacheRecord:
    stages = (Stage.ENCODER, Stage.DENOISER)
    task = case.task if case else ""
    cached, plain = (
        StagePipeline.load(
            model, stages, dtype=torch.float32, device=CPU, options=ModelOptions(task=task, step_cache=each)
        )
        for each in (text, "")
    )
    assert cached.step_cache is not None  # noqa: S101 - it was asked for
    payloads = list(_payloads(cached, load_serving_config(model).defaults if case is None else case.inputs))
    alone = [_finish([cached.denoise(payload)])[0] for payload in payloads]
    reused = 1 - cached.step_cache.computed / max(cached.step_cache.calls, 1)
    runs = [cached.denoise(payload) for payload in payloads]
    states = [weakref.ref(run.step_cache) for run in runs if run.step_cache is not None]
    together = _finish(runs)
    without = {**payloads[1], "cache": False}
    mixed = _finish([cached.denoise(payloads[0]), cached.denoise(without)])
    (expected,) = _finish([plain.denoise({name: value for name, value in without.items() if name != "cache"})])
    gc.collect()
    return CacheRecord(
        family="",
        cache=text,
        reused=reused,
        identical=all(map(_same, alone, together)) and _same(mixed[0], alone[0]),
        off_identical=_same(mixed[1], expected),
        freed=not any(state() is not None for state in states),
    )


def _payloads(pipeline: StagePipeline, inputs: Mapping[str, Any]) -> Iterator[dict[str, object]]:
    prompts = (PROMPT, PROMPT.replace("red", "green"))
    for number, (prompt, steps) in enumerate(zip(prompts, STEPS, strict=True)):
        asked = {"prompt": prompt, "num_inference_steps": steps}
        known = {name: value for name, value in asked.items() if name in pipeline.accepted}
        schedule = {name: list(inputs[name][:1]) * steps for name in ("guidance_schedule",) if name in inputs}
        if "num_inference_steps" not in inputs:  # the number of steps of a distilled model is fixed
            known.pop("num_inference_steps", None)
        yield pipeline.encode({**inputs, **known, **schedule}, number)


def _finish(runs: Sequence[Denoising]) -> list[dict[str, object]]:
    live = list(runs)
    while live:
        live = [run for run in live if run.advance()]
    return [run.result() for run in runs]


def _same(one: Mapping[str, object], other: Mapping[str, object]) -> bool:
    tensors = [
        [leaf for leaf in pytree.tree_leaves(dict(each)) if isinstance(leaf, torch.Tensor)] for each in (one, other)
    ]
    return len(tensors[0]) == len(tensors[1]) and all(map(torch.equal, *tensors))
