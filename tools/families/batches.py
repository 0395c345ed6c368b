"""Whether calls of several requests are computed together, for every task, how close to alone, and with which bits."""

from __future__ import annotations

import importlib.util
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import diffusers
import msgspec
import numpy as np
import torch
import transformers
from PIL import Image
from torch.utils import _pytree as pytree

from triptych.engines.parameters.serving_config import SERVING_CONFIG_NAME
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.engines.steps.denoising import Denoising
from triptych.engines.steps.executor import StepExecutor, WaitingCall
from triptych.engines.steps.probing import MergeRules, difference
from triptych.tools.families.cases import PROMPT, Case, cases
from triptych.tools.families.classes import Sample, by_class, tiny_components
from triptych.tools.families.stage_processes import CPU
from triptych.tools.families.survey import bounded, sentence
from triptych.tools.make_model import make_model

BUCKET: Final = 4
PROMPTS: Final = (
    PROMPT,
    "a large blue circle on the left of a red background",
    "a blue red circle on the background of a large left",
)
"""The same words, so that texts are as long; calls with texts of other lengths are not computed together."""
STEPS: Final = "num_inference_steps"
SCALE: Final = "guidance_scale"
SCHEDULE: Final = "guidance_schedule"


class BatchRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A row.

    Attributes:
        pipeline: The name of the class.
        task: The task of a modular pipeline; "" for one.
        calls: The largest number of calls in one forward, of three requests.
        closeness: The largest difference of what a merged call gave to a request from the call alone, as a part of
            the norm of its output.
        result_closeness: The largest difference of a result among others from the result alone in a bucket of 1, as a
            part of its largest value. Images are rounded to 256 levels; one level is not counted.
        identical: Whether the request has the same bits among others and alone in the same bucket, with others before
            and after it.
        why: What prevents batching, or why the row was not run.
        seconds: How long the row took.
    """

    pipeline: str
    task: str = ""
    calls: int = 0
    closeness: float | None = None
    result_closeness: float | None = None
    identical: bool | None = None
    why: str = ""
    seconds: float = 0.0

    @property
    def key(self) -> str:
        """The name of the row."""
        return f"{self.pipeline}:{self.task}"

    @property
    def bad(self) -> bool:
        """Whether it ran, and is not what is promised."""
        return self.identical is False or (self.closeness is not None and not self.closeness <= CLOSE)


_COLUMNS: Final = ("pipeline", "task", "calls", "difference", "bits among others", "why")
CLOSE: Final = 1e-5
"""The closeness of calls up to which a row is what is promised, in float32."""


def names() -> list[str]:
    """Return the names of all rows: modular pipelines with their tasks, then classes."""
    return [*(f"{case.pipeline}:{case.task}" for case in cases()), *(f"{name}:" for name in by_class())]


def row(name: str, limit_s: float) -> BatchRecord:
    """Run a row in a process of its own.

    Args:
        name: As `names` has it.
        limit_s: Seconds until it is ended.
    """
    began = time.monotonic()
    pipeline, _, task = name.partition(":")
    case = next((case for case in cases() if (case.pipeline, case.task) == (pipeline, task)), None)
    sample = by_class().get(pipeline)
    source: Case | Sample
    if case is not None:
        source, unbuilt = case, ""
    elif sample is not None:
        source, unbuilt = sample, sample.unbuilt
    else:
        return BatchRecord(pipeline=pipeline, task=task, why="no tiny model")
    if lacking := [package for package in source.needs if importlib.util.find_spec(package) is None]:
        unbuilt = f"needs {' and '.join(lacking)}"
    if unbuilt:
        return BatchRecord(pipeline=pipeline, task=task, why=unbuilt)
    answer = bounded(lambda: msgspec.json.encode(_row(source)), limit_s)
    if answer is None:
        return BatchRecord(pipeline=pipeline, task=task, why=f"the run ended, or took more than {limit_s:.0f} s")
    record = msgspec.json.decode(answer, type=BatchRecord)
    return msgspec.structs.replace(record, seconds=round(time.monotonic() - began, 1))


def _row(source: Case | Sample) -> BatchRecord:
    task = source.task if isinstance(source, Case) else ""
    with tempfile.TemporaryDirectory(prefix="triptych-batch-") as folder:
        try:
            record = compare(_model(source, Path(folder)), source.inputs, source.pipeline)
        except Exception as error:  # noqa: BLE001 - the reason of the row
            return BatchRecord(pipeline=source.pipeline, task=task, why=sentence(error))
        return msgspec.structs.replace(record, task=task)


def _model(source: Case | Sample, folder: Path) -> Path:
    if isinstance(source, Sample):
        tiny_components.make(source, folder)
        return folder
    make_model(folder, source.family, progress=False)
    config = folder / SERVING_CONFIG_NAME
    config.write_text(json.dumps({**json.loads(config.read_text()), "task": source.task}))
    return folder


def compare(model: Path, inputs: Mapping[str, Any], name: str) -> BatchRecord:
    """Run a request alone, and with two that differ in prompt, seed, step, number of steps and guidance.

    Args:
        model: The folder of the model.
        inputs: The inputs of the request.
        name: The name of the row's pipeline.
    """
    torch.set_num_threads(1)
    pipeline = StagePipeline.load(model, tuple(Stage), dtype=torch.float32, device=CPU)
    payloads = [pipeline.encode(_varied(pipeline, inputs, number), 11 + number) for number in range(3)]
    solo = [_results([pipeline.denoise(payload)], StepExecutor())[0] for payload in payloads]
    executor = _ComparingExecutor()
    orders = ((0, 1, 2), (2, 1, 0))
    together = []
    with _Messages() as messages:
        alone = _results([pipeline.denoise(payloads[0], BUCKET)], executor)[0]
        for order in orders:
            runs = [pipeline.denoise(payloads[number], BUCKET) for number in order]
            # Let the neighbours be a step ahead.
            executor.advance([run for run, number in zip(runs, order, strict=True) if number])
            results = _results(runs, executor)
            together.append([results[order.index(number)] for number in range(3)])
    result = max(_closeness(mine, theirs) for mine, theirs in zip(together[0], solo, strict=True))
    identical = all(_identical(alone, results[0]) for results in together)
    calls = max(executor.group_sizes)
    # A part may be computed alone, such as a module that is called once.
    why = "; ".join(messages.alone) or (
        "" if calls > 1 else "no two calls have the same shapes and equal values where these must be equal"
    )
    close = executor.closeness
    return BatchRecord(
        pipeline=name, calls=calls, closeness=close, result_closeness=result, identical=identical, why=why
    )


class _ComparingExecutor(StepExecutor):
    """Compares each merged call with the call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.closeness = 0.0

    def compute_merged(self, group: Sequence[WaitingCall], rules: MergeRules) -> None:
        alone = [each.call.forward(**each.arguments.copied()) for each in group]
        super().compute_merged(group, rules)
        for each, expected in zip(group, alone, strict=True):
            if each.call.error is None:
                self.closeness = max(self.closeness, difference(each.call.output, expected))


def _varied(pipeline: StagePipeline, inputs: Mapping[str, Any], number: int) -> dict[str, Any]:
    varied = dict(inputs)
    if "prompt" in pipeline.accepted and isinstance(varied.get("prompt", ""), str) and "prompt_embeds" not in varied:
        varied["prompt"] = PROMPTS[number]
    if isinstance(varied.get(STEPS), int):
        varied[STEPS] += number
    if isinstance(varied.get(SCALE), (int, float)):
        varied[SCALE] += number
    if isinstance(varied.get(SCHEDULE), list):  # a scale for each step
        varied[STEPS] = len(varied[SCHEDULE])
        varied[SCHEDULE] = [scale + number for scale in varied[SCHEDULE]]
    return varied


def _results(runs: Sequence[Denoising], executor: StepExecutor) -> list[dict[str, object]]:
    live = list(runs)
    while live:
        results = executor.advance(live)
        for result in results:
            if result.error is not None:
                raise result.error
        live = [run for run, result in zip(live, results, strict=True) if result.more]
    return [run.result() for run in runs]


def _arrays(result: Mapping[str, object]) -> Iterator[np.ndarray[Any, Any]]:
    for leaf in pytree.tree_leaves(dict(result)):
        if isinstance(leaf, torch.Tensor):
            yield leaf.detach().float().numpy()
        elif isinstance(leaf, (np.ndarray, Image.Image)):
            yield np.asarray(leaf)


def _identical(left: Mapping[str, object], right: Mapping[str, object]) -> bool:
    pairs = zip(_arrays(left), _arrays(right), strict=True)
    return all(one.shape == other.shape and one.tobytes() == other.tobytes() for one, other in pairs)


def _closeness(mine: Mapping[str, object], theirs: Mapping[str, object]) -> float:
    worst = 0.0
    for one, other in zip(_arrays(mine), _arrays(theirs), strict=True):
        largest = max(np.abs(other.astype(np.float64)).max(initial=0), 1e-9)
        apart = np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0)
        levels = 1 if other.dtype == np.uint8 else 0
        worst = max(worst, float(max(apart - levels, 0) / largest))
    return worst


class _Messages(logging.Handler):
    """Collects what the prober says about modules whose calls are computed alone."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.alone: list[str] = []
        self._log = logging.getLogger("triptych.engines.steps.probing")

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "computed alone" in text:
            self.alone.append(text.removeprefix("calls of ").replace("are computed alone", "alone"))

    def __enter__(self) -> _Messages:
        self._log.addHandler(self)
        self._log.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        self._log.removeHandler(self)


def read_records(path: Path) -> dict[str, BatchRecord]:
    """Read the rows that earlier runs have left in a file, by name; the last one of a name counts."""
    if not path.exists():
        return {}
    records = [msgspec.json.decode(line, type=BatchRecord) for line in path.read_text().splitlines() if line]
    return {record.key: record for record in records}


def append_record(path: Path, record: BatchRecord) -> None:
    """Add a row to the file that `read_records` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(record) + b"\n")


def run(
    chosen: Sequence[str], known: Mapping[str, BatchRecord], *, row_s: float, total_s: float
) -> Iterator[BatchRecord]:
    """Run rows that are not known, one by one.

    Args:
        chosen: Their names.
        known: Rows that have run before; more may be added while this runs.
        row_s: Seconds that a row may take.
        total_s: Seconds after which no further row is begun.
    """
    began = time.monotonic()
    for name in chosen:
        if name not in known and time.monotonic() - began < total_s:
            yield row(name, row_s)


# The table ----------------------------------------------------------------------------------------------------


def line(record: BatchRecord) -> str:
    """Return a row for a terminal."""
    return f"{record.key} {': '.join(_cells(record)[2:])} ({record.seconds} s)"


def summary(records: Sequence[BatchRecord]) -> str:
    """Return the totals in a sentence."""
    ran = [record for record in records if record.calls]
    together = [record for record in ran if record.calls > 1]
    same = sum(record.identical is True for record in ran)
    worst = max((record.closeness or 0.0 for record in together), default=0.0)
    return (
        f"{len(records)} rows; {len(ran)} ran, {len(together)} of them with calls of several requests in one forward;"
        f" {same} have the same bits among others as alone. The largest difference of a call from the call alone is"
        f" {worst:.0e} of its norm."
    )


def markdown(records: Sequence[BatchRecord]) -> str:
    """Return the part of `docs/families.md` with a row for every task that ran."""
    ran = [record for record in records if record.calls]
    lines = [
        f"Made by `python -m triptych.tools.families batch --results FILE --markdown docs/families.md` with diffusers"
        f" {diffusers.__version__}, transformers {transformers.__version__} and torch {torch.__version__}, in float32.",
        "",
        summary(ran),
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{' --- |' * len(_COLUMNS)}",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in _cells(record))} |" for record in ran),
    ]
    return "\n".join(lines) + "\n"


def _cells(record: BatchRecord) -> tuple[str, ...]:
    name = record.pipeline.removesuffix("Pipeline")
    if not record.calls:
        return (name, record.task or "-", "not run", "", "", record.why)
    how = f"{record.calls} together" if record.calls > 1 else "alone"
    close = f"{record.closeness:.0e}" if record.calls > 1 else "-"
    return (name, record.task or "-", how, close, "identical" if record.identical else "differs", record.why)
