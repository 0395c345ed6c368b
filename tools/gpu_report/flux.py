"""Rows `flux` and `roles`: FLUX.1-dev with random weights at full shapes, in one process and in three."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from diffusers import FluxPipeline, ModularPipeline

from triptych.engines.panels import Panel
from triptych.engines.pipeline import PanelPipeline
from triptych.roles.devices import use_exact_kernels
from triptych.tools.bench.clusters import write_topology
from triptych.tools.gpu_report.bench import Bench, RowFailedError
from triptych.tools.gpu_report.models import (
    DTYPE,
    FluxShapes,
    flux_shapes,
    folder_with_room,
    of_parts,
    places,
    prepare,
    randomised,
    save,
)
from triptych.tools.gpu_report.served import PANELS, PROMPT, SEED, digest, pixels, report_kill, report_memory, serving
from triptych.tools.make_model import write_model

GUIDANCE: Final = 3.5
WARM_UP: Final = 2
"""Steps of a picture that is not measured."""
EXPECTED: Final = "picture.sha256"
"""The file beside the weights with the digest of the picture that one process makes of them."""
KILL_S: Final = 60.0
"""Seconds that must be left for killing a denoiser that has 24 GB of weights to load again."""


@torch.no_grad()
def one_process(bench: Bench) -> None:
    """Draw with diffusers alone, then with the engine that each role has, in this process."""
    shapes = flux_shapes(bench)
    bench.needs(shapes.card_gib)
    _plain_in_memory(bench, shapes)
    model = _written(bench, shapes)
    _release(bench)
    use_exact_kernels()
    engine = _loaded(bench, model)
    expected = _engine(bench, shapes, engine)
    (model / EXPECTED).write_text(expected)
    _same_as_plain(bench, shapes, model, engine, expected)


def three_processes(bench: Bench) -> None:
    """Serve the same weights with a process for each stage; draw, look at the memory, and kill the denoiser."""
    shapes = flux_shapes(bench)
    bench.needs(shapes.card_gib)
    model = _written(bench, shapes)
    _release(bench)
    topology = write_topology(bench.scratch / "roles", model, "bfloat16", dict.fromkeys(PANELS, 1), 1)
    asyncio.run(_three(bench, shapes, model, topology))


async def _three(bench: Bench, shapes: FluxShapes, model: Path, topology: Path) -> None:
    sections: dict[str, dict[str, object]] = {"transfer": {"pool_size": "512MiB" if bench.full else "64MiB"}}
    begun = time.perf_counter()
    async with serving(bench, topology, PANELS, **sections) as cluster:
        bench.value("ready", time.perf_counter() - begun, "s", "interpreters, libraries, weights")
        await cluster.generate(PROMPT, seed=SEED, steps=WARM_UP)
        begun = time.perf_counter()
        drawn = await cluster.generate(PROMPT, seed=SEED)
        bench.value("a picture", time.perf_counter() - begun, "s", "over HTTP; its prompt was encoded before")
        begun = time.perf_counter()
        other = await cluster.generate(f"{PROMPT}, at night", seed=SEED)
        bench.value("a picture of a new prompt", time.perf_counter() - begun, "s", "over HTTP")
        (unit,) = (await cluster.request(other.request_id))["units"]
        for stage, seconds in unit["stage_seconds"].items():
            bench.value(f"of it, {stage}", seconds, "s")
        await report_memory(bench, cluster)
        found = digest(drawn)
        _compare(bench, model, found)
        if bench.full and bench.left_s < KILL_S:
            bench.value("kill -9 to the next step", "left out", note="the time was short")
            return
        if shapes.long != shapes.steps:
            found = digest(await cluster.generate(PROMPT, seed=SEED, steps=shapes.long))
        await report_kill(bench, cluster, shapes.long, found)


def _compare(bench: Bench, model: Path, found: str) -> None:
    expected = model / EXPECTED
    if not expected.is_file():
        return
    same = expected.read_text() == found
    bench.value("bytes equal those of one process", "yes" if same else "no")
    if not same:
        raise RowFailedError("Three processes make another picture than one.")


# -- one process


def _plain_in_memory(bench: Bench, shapes: FluxShapes) -> None:
    """Measure diffusers alone on weights that were made on the device, and keep those as files."""
    begun = time.perf_counter()
    parts = {name: randomised(make, bench.device) for name, make in shapes.recipe.components.items() if make}
    bench.synchronize()
    bench.value("weights made", time.perf_counter() - begun, "s", "random, on the device")
    pipeline = FluxPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    prepare(pipeline.transformer, bench)
    draw = _draw(pipeline, shapes)
    draw(WARM_UP)
    bench.forget_peak()
    bench.value("a picture, diffusers alone", bench.clock(lambda: draw(shapes.steps)), "s", _what(bench, shapes))
    bench.peak("diffusers alone, one process")
    moments: list[float] = []

    def ended(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        bench.synchronize()
        moments.append(time.perf_counter())
        return values

    draw(max(4, shapes.steps // 4), callback_on_step_end=ended)
    bench.value("a step, diffusers alone", _between(moments), "s")
    _write(bench, shapes, parts)


def _engine(bench: Bench, shapes: FluxShapes, engine: PanelPipeline) -> str:
    """Measure encode, each step and decode; returns the digest of the picture."""
    _picture(bench, engine, _request(shapes, WARM_UP))
    inputs = _request(shapes, shapes.steps)
    begun = time.perf_counter()
    state = _timed(bench, "encode", lambda: engine.encode(inputs, SEED))
    denoising = engine.denoise(state)
    bench.forget_peak()
    moments = [time.perf_counter()]
    while denoising.advance():
        bench.synchronize()
        moments.append(time.perf_counter())
    bench.peak("denoise, one process")
    made = _timed(bench, "decode", lambda: engine.decode(denoising.result()))
    bench.value(
        "a picture, our engine", time.perf_counter() - begun, "s", f"{_what(bench, shapes)}, waiting after each step"
    )
    bench.value("a step, our engine", _between(moments), "s")
    return pixels(_first(made))


def _picture(bench: Bench, engine: PanelPipeline, inputs: dict[str, object]) -> Any:
    denoising = engine.denoise(engine.encode(inputs, SEED))
    while denoising.advance():
        pass
    made = engine.decode(denoising.result())
    bench.synchronize()
    return _first(made)


def _same_as_plain(bench: Bench, shapes: FluxShapes, model: Path, engine: PanelPipeline, expected: str) -> None:
    """Draw with the blocks of diffusers, undivided, on the components that the engine has loaded.

    Not with `FluxPipeline`: in bfloat16 that rounds its timesteps otherwise than the blocks do.
    """
    ours = engine._parts.pipeline
    pipeline = ModularPipeline.from_pretrained(str(model), local_files_only=True)
    pipeline.update_components(**{name: getattr(ours, name) for name in shapes.recipe.components})
    drawn: list[Any] = []

    def draw() -> None:
        generator = torch.Generator("cpu").manual_seed(SEED)
        drawn.append(pipeline(**_request(shapes, shapes.steps), generator=generator, output="images")[0])

    bench.value("a picture, diffusers' blocks", bench.clock(draw), "s", _what(bench, shapes))
    same = pixels(drawn[0]) == expected
    bench.value("bytes of our engine equal those of diffusers' blocks", "yes" if same else "no")
    if not same:
        raise RowFailedError("Our engine makes another picture than the blocks of diffusers.")


def _draw(pipeline: Any, shapes: FluxShapes) -> Callable[..., Any]:
    def draw(steps: int, **more: Any) -> Any:
        given = _request(shapes, steps)
        return pipeline(**given, generator=torch.Generator("cpu").manual_seed(SEED), **more).images[0]

    return draw


def _request(shapes: FluxShapes, steps: int) -> dict[str, object]:
    return {
        "prompt": PROMPT,
        "height": shapes.side,
        "width": shapes.side,
        "num_inference_steps": steps,
        "guidance_scale": GUIDANCE,
        "max_sequence_length": int(shapes.recipe.defaults["max_sequence_length"]),
    }


def _loaded(bench: Bench, model: Path) -> PanelPipeline:
    begun = time.perf_counter()
    engine = PanelPipeline.load(model, tuple(Panel), dtype=DTYPE, device=bench.device)
    bench.synchronize()
    bench.value("weights loaded", time.perf_counter() - begun, "s", f"by our engine, from {model.parent}")
    prepare(engine._parts.pipeline.transformer, bench)
    return engine


def _timed(bench: Bench, what: str, function: Callable[[], dict[str, object]]) -> dict[str, object]:
    made: dict[str, object] = {}
    bench.forget_peak()
    bench.value(f"{what}, our engine", bench.clock(lambda: made.update(function())), "s")
    bench.peak(f"{what}, one process")
    return made


def _first(made: dict[str, object]) -> Any:
    images = made["images"]
    return images[0] if isinstance(images, list) else images


def _between(moments: list[float]) -> float:
    """Return the median seconds between moments."""
    return statistics.median(later - earlier for earlier, later in pairwise(moments))


def _what(bench: Bench, shapes: FluxShapes) -> str:
    modes = [f"attention {bench.settings.attention}"] if bench.settings.attention else []
    modes += ["compiled"] if bench.settings.compile else []
    return ", ".join([f"{shapes.side} x {shapes.side}, {shapes.steps} steps, bfloat16", *modes])


def _release(bench: Bench) -> None:
    """Give the memory of what is no more back to the card."""
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()


# -- the files


def _written(bench: Bench, shapes: FluxShapes) -> Path:
    """Return the folder of the model; it is written unless a row before has done that."""
    if (model := _find(bench)) is not None:
        return model
    parts = {name: randomised(make, bench.device) for name, make in shapes.recipe.components.items() if make}
    return _write(bench, shapes, parts)


def _find(bench: Bench) -> Path | None:
    folders = [place / "flux" for place in places(bench.scratch)]
    # The index is written when all components are there.
    return next((folder for folder in folders if (folder / "model_index.json").is_file()), None)


def _write(bench: Bench, shapes: FluxShapes, parts: dict[str, Any]) -> Path:
    folder = folder_with_room(bench, shapes.nbytes) / "flux"
    begun = time.perf_counter()
    write_model(folder, "flux", of_parts(shapes.recipe, parts), 0, progress=False, save=save)
    nbytes = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    bench.value("weights written", time.perf_counter() - begun, "s", f"{nbytes / 1e9:.3g} GB in {folder.parent}")
    return folder
