"""The survey of pipeline classes: make a tiny model of each, run it as the class does and as Triptych does, compare."""

from __future__ import annotations

import dataclasses
import fnmatch
import importlib.util
import inspect
import os
import re
import select
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import diffusers
import msgspec
import numpy as np
import torch
from PIL import Image

from triptych.engines.model_options import ModelOptions
from triptych.engines.parameters.media import SAMPLING_RATE, medium_of, results_of
from triptych.engines.partition.strategy import strategy_for
from triptych.engines.pipelines.component_settings import VAE_TILING
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.pipelines.random_state import GlobalRngGuard, seeded_generator
from triptych.engines.stages import Stage
from triptych.tools.families.classes import Sample, by_class, tiny_components
from triptych.tools.families.compare import SEED, arrays, difference, identical
from triptych.tools.families.stage_processes import CPU, StageError, StageProcesses, fork_stage_processes

_EXITS_ON_IMPORT: Final = ("ConsisIDPipeline",)
"""Classes whose import ends the process where a package is missing."""
_FLAG_OUTPUTS: Final = (SAMPLING_RATE, "nsfw_content_detected", "nsfw_detected", "watermark_detected")
"""Results that are not media."""
_FOLDER: Final = "triptych-class-"
_ABSTRACT: Final = ("DiffusionPipeline",)


class Trial(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one way to serve a class.

    Attributes:
        served: Whether a request was answered.
        identical: Whether with the bits that the class makes.
        why: Why not, in a line; "" where it was.
    """

    served: bool = False
    identical: bool = False
    why: str = ""


class SurveyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the survey.

    Attributes:
        pipeline: Name of the class.
        task: What its request gives and what it makes, such as "text, image → image".
        route: By which it is served; "" where no model was made.
        unbuilt: Why there is no model, or the class itself makes nothing of it; "" where there is one.
        cut: Served by three processes.
        whole: Served by one.
        classic_cut: Served by three processes with `route = "classic"`, where blocks do not make the bits of the class.
        classic_whole: Likewise by one process.
        seconds: That the row took.
    """

    pipeline: str
    task: str = ""
    route: str = ""
    unbuilt: str = ""
    cut: Trial = Trial()
    whole: Trial = Trial()
    classic_cut: Trial | None = None
    classic_whole: Trial | None = None
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether it could be built and is not served with the same bits in any way."""
        return not self.unbuilt and not (self.by_three.identical or self.by_one.identical)

    @property
    def done(self) -> bool:
        """Whether no result of it is to be improved."""
        return not self.unbuilt and (self.by_three.identical or self.route == "monolithic") and self.by_one.identical

    @property
    def by_three(self) -> Trial:
        """The best result of three processes, by any route."""
        return self.cut if self.classic_cut is None or self.cut.identical else self.classic_cut

    @property
    def by_one(self) -> Trial:
        """The best result of one process, by any route."""
        return self.whole if self.classic_whole is None or self.whole.identical else self.classic_whole


@cache
def classes() -> dict[str, str]:
    """Return all pipeline classes of the installed diffusers by name, with the packages that each lacks or ""."""
    found = {}
    for name in sorted(dir(diffusers)):
        if name in _EXITS_ON_IMPORT:
            found[name] = _imported(name)
            continue
        cls = getattr(diffusers, name, None) if "Pipeline" in name else None
        if backends := _missing(cls):
            found[name] = f"needs {' and '.join(backends)}"
        elif isinstance(cls, type) and issubclass(cls, diffusers.DiffusionPipeline) and name not in _ABSTRACT:
            found[name] = ""
    return found


def _imported(name: str) -> str:
    try:
        getattr(diffusers, name)
    except (ImportError, RuntimeError, SystemExit):
        return "needs opencv-python"
    return ""


def _missing(cls: Any) -> list[str]:
    """Return the packages that diffusers' placeholder of a class requires."""
    if not getattr(cls, "__module__", "").startswith("diffusers.utils.dummy"):
        return []
    return [name for name in cls._backends if importlib.util.find_spec(name) is None]


def survey(name: str, limit_s: float) -> SurveyRecord:
    """Run the row of a class in a process of its own, which contains crashes and endless loops.

    Args:
        name: Of the class.
        limit_s: Seconds until it is ended.
    """
    begun = time.monotonic()
    sample = by_class().get(name)
    if sample is None:
        return SurveyRecord(pipeline=name, unbuilt=classes().get(name) or "no tiny model has been made of it yet")
    if sample.unbuilt:
        return SurveyRecord(pipeline=name, unbuilt=sample.unbuilt)
    if lacking := [package for package in sample.needs if importlib.util.find_spec(package) is None]:
        return SurveyRecord(pipeline=name, unbuilt=f"needs {' and '.join(lacking)}")
    answer = bounded(lambda: msgspec.json.encode(_row(sample)), limit_s)
    if answer is None:
        answer = msgspec.json.encode(
            SurveyRecord(pipeline=name, unbuilt=f"the run ended, or took more than {limit_s:.0f} s")
        )
    record = msgspec.json.decode(answer, type=SurveyRecord)
    return msgspec.structs.replace(record, seconds=round(time.monotonic() - begun, 1))


def bounded(work: Callable[[], bytes], limit_s: float) -> bytes | None:
    """Return the result of a function in a forked process; None if that crashed or took too long."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        try:
            os.close(reading)
            os.write(writing, work() + b"\n")
        finally:
            os._exit(0)
    os.close(writing)
    try:
        return _line(reading, time.monotonic() + limit_s)
    finally:
        os.close(reading)
        # With the stages that it may have left.
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _line(pipe: int, deadline: float) -> bytes | None:
    read = b""
    while not read.endswith(b"\n"):
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(pipe, 65536) if ready else b""
        if not part:
            return None
        read += part
    return read


def _row(sample: Sample) -> SurveyRecord:
    with fork_stage_processes() as processes, tempfile.TemporaryDirectory(prefix=_FOLDER) as folder:
        return row(sample, Path(folder), processes)


def row(sample: Sample, folder: Path, processes: StageProcesses) -> SurveyRecord:
    """Make the model of a sample, run its request as the class does and in both ways, and compare."""
    try:
        tiny_components.make(sample, folder)
    except Exception as error:  # noqa: BLE001 - the reason of the row
        return SurveyRecord(pipeline=sample.pipeline, unbuilt=f"no model: {sentence(error)}")
    try:
        expected = run_reference(sample, folder)
    except Exception as error:  # noqa: BLE001 - the reason of the row
        return SurveyRecord(pipeline=sample.pipeline, unbuilt=_class_failure(error))
    if all("embed" in name for name in expected):
        return SurveyRecord(
            pipeline=sample.pipeline, unbuilt=f"no media: it makes {_output_kinds(expected)} for another pipeline"
        )
    if flat := [name for name, value in expected.items() if not _is_not_flat(value)]:
        return SurveyRecord(pipeline=sample.pipeline, unbuilt=f"the tiny model makes flat {' and '.join(flat)}")
    task = f"{_input_kinds(sample.inputs)} → {_output_kinds(expected)}"
    try:
        route = str(strategy_for(folder))
    except Exception as error:  # noqa: BLE001 - the reason of the row
        route, reason = "none", sentence(error)
        return SurveyRecord(
            pipeline=sample.pipeline, task=task, route=route, cut=Trial(why=reason), whole=Trial(why=reason)
        )
    if route == "monolithic":
        cut = Trial(why="cannot be cut")
    else:
        cut = _trial(expected, lambda: processes.run(folder, dict(sample.inputs), SEED)[0])
    whole = _trial(expected, lambda: _run_monolithic(folder, sample.inputs))
    record = SurveyRecord(pipeline=sample.pipeline, task=task, route=route, cut=cut, whole=whole)
    if route != "modular" or (cut.identical and whole.identical):
        return record
    return msgspec.structs.replace(
        record,
        classic_cut=_trial(expected, lambda: processes.run(folder, dict(sample.inputs), SEED, route="classic")[0]),
        classic_whole=_trial(expected, lambda: _run_monolithic(folder, sample.inputs, route="classic")),
    )


def run_reference(sample: Sample, folder: Path) -> dict[str, Any]:
    """Run a request with diffusers alone; return its results by name, without flags.

    Where the class draws from the global generator, a denoiser of ours does from one of the same seed.
    """
    cls = getattr(diffusers, sample.pipeline)
    pipeline = cls.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    taken = inspect.signature(cls.__call__).parameters
    given = dict(sample.inputs)
    if given.pop(VAE_TILING, False):
        pipeline.vae.enable_tiling()
    if "generator" in taken:
        given["generator"] = seeded_generator(SEED)
    if "output_type" in taken:
        results = results_of(cls.__call__)
        if medium_of(results) != "image":
            given["output_type"] = "np"
        elif "images" in results:
            given["output_type"] = "pil"
    with GlobalRngGuard(SEED, Stage.DENOISER):
        made = pipeline(**given)
    values = vars(made) if dataclasses.is_dataclass(made) else {"results": made}
    found = {name: value for name, value in values.items() if value is not None and name not in _FLAG_OUTPUTS}
    return {**found, "images": _marigold_images(pipeline, found["prediction"])} if "prediction" in found else found


def _marigold_images(pipeline: Any, prediction: np.ndarray[Any, Any]) -> list[Any]:
    """Make images of what Marigold predicts: depth with 16 bits, the rest as in its documentation."""
    kind = pipeline.config["prediction_type"]
    if kind == "depth":
        return [(values[..., 0] * 65535).astype(np.uint16) for values in prediction]
    if kind == "normals":
        return list(pipeline.image_processor.visualize_normals(prediction))
    drawn = pipeline.image_processor.visualize_intrinsics(prediction, pipeline.target_properties)
    return [image for layers in drawn for image in layers.values()]


def _run_monolithic(folder: Path, inputs: Mapping[str, Any], route: str = "") -> dict[str, Any]:
    options = ModelOptions(route=route)
    pipeline = StagePipeline.load(folder, tuple(Stage), dtype=torch.float32, device=CPU, options=options)
    denoising = pipeline.denoise(pipeline.encode(inputs, SEED))
    while denoising.advance():
        pass
    return pipeline.decode(denoising.result())


def _trial(expected: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> Trial:
    try:
        made = {name: value for name, value in run().items() if name not in _FLAG_OUTPUTS}
    except Exception as error:  # noqa: BLE001 - the reason of the row
        return Trial(why=sentence(error))
    if not made:
        return Trial(why=f"nothing that is served comes out, only {', '.join(expected)}")
    differing = {}
    for name, value in made.items():
        if not any(_same(value, other) for other in expected.values()):
            found = [difference(value, other) for other in expected.values()]
            differing[name] = min((worst for worst in found if worst is not None), default=None)
    if differing:
        why = ", ".join(f"{name} differ by {_number(worst)}" for name, worst in differing.items())
        return Trial(served=True, why=why)
    return Trial(served=True, identical=True)


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two values are the same, bit for bit; a list of images is the same as an array of them."""
    left, right = (
        [{(array.dtype, array.shape[-3:]) for array in arrays(value)}, b"".join(map(np.ndarray.tobytes, arrays(value)))]
        for value in (ours, theirs)
    )
    return identical(ours, theirs) or (bool(left[1]) and left == right)


def _number(worst: float | None) -> str:
    return "their shape" if worst is None else f"up to {worst:.3g}"


def _class_failure(error: Exception) -> str:
    if found := re.search(r"`diffusers` has no class `(\w+)`|pipelines.deprecated has no attribute (\w+)", str(error)):
        return f"diffusers cannot load its own {found[1] or found[2]} from a folder"
    return f"the class itself fails: {sentence(error)}"


def sentence(error: BaseException) -> str:
    """Return the type of an error and the first line of its text, short enough for a table."""
    text = re.sub(rf"\S*{_FOLDER}\w+", "MODEL", str(error)).strip().partition("\n")[0]
    kind = "" if isinstance(error, StageError) else f"{type(error).__name__}: "
    return f"{kind}{text}"[:200]


def _is_not_flat(value: Any) -> bool:
    numbers = [array for array in arrays(value) if array.dtype.kind in "fiub" and array.size > 1]
    return all(np.isfinite(array).all() and array.min() != array.max() for array in numbers)


def _input_kinds(inputs: Mapping[str, Any]) -> str:
    kinds = [_kind(name, value) for name, value in inputs.items()]
    return ", ".join(dict.fromkeys(kind for kind in kinds if kind)) or "nothing"


def _kind(name: str, value: Any) -> str:
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    if "prompt" in name and isinstance(first, str):
        return "text"
    if isinstance(first, torch.Tensor):
        return "tensors"
    if "mask" in name and isinstance(first, (Image.Image, np.ndarray)):
        return "mask"
    if isinstance(first, Image.Image):
        return "video" if "video" in name or "frames" in name else "image"
    return "array" if isinstance(first, np.ndarray) else ""


def _output_kinds(values: Mapping[str, Any]) -> str:
    names = {"images": "image", "image": "image", "frames": "video", "videos": "video", "audios": "sound"}
    return ", ".join(names.get(name, name.replace("_", " ")) for name in values)


def read_records(path: Path) -> dict[str, SurveyRecord]:
    """Read the rows that earlier runs have left in a file, by class; the last one of a class counts."""
    if not path.exists():
        return {}
    records = [msgspec.json.decode(line, type=SurveyRecord) for line in path.read_text().splitlines() if line]
    return {record.pipeline: record for record in records}


def append_record(path: Path, record: SurveyRecord) -> None:
    """Add a row to the file that `read_records` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(msgspec.json.encode(record) + b"\n")


def is_selected(name: str, only: str) -> bool:
    """Whether a class is one of those in a list with commas; `*` stands for any text."""
    return not only or any(fnmatch.fnmatchcase(name, pattern.strip()) for pattern in only.split(","))


def run(
    names: Sequence[str], known: Mapping[str, SurveyRecord], *, again: bool, row_s: float, total_s: float
) -> Iterator[SurveyRecord]:
    """Run rows one by one.

    Args:
        names: Of the classes.
        known: Rows that have run before, by class; they are left out.
        again: Whether those of them that are not all that they could be run again.
        row_s: Seconds that a row may take.
        total_s: Seconds after which no further row is begun.
    """
    begun = time.monotonic()
    for name in names:
        record = known.get(name)
        wanted = record is None or (again and not record.done)
        if wanted and time.monotonic() - begun < total_s:
            yield survey(name, row_s)
