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

from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.roles.worker.devices import use_exact_kernels
from triptych.tools.bench.clusters import write_topology
from triptych.tools.gpu_report.clusters import (
    PROMPT,
    SEED,
    STAGES,
    digest,
    pixels,
    report_kill,
    report_memory,
    served_cluster,
)
from triptych.tools.gpu_report.models import (
    DTYPE,
    FluxShapes,
    flux_shapes,
    folder_with_space,
    prepare,
    recipe_of_components,
    save,
    scratch_folders,
    with_random_weights,
)
from triptych.tools.gpu_report.row_context import RowContext, RowFailedError
from triptych.tools.make_model import write_model

GUIDANCE: Final = 3.5
WARM_UP: Final = 2
"""Steps of an image that is not measured."""
EXPECTED: Final = "image.sha256"
"""The file beside the weights with the digest of the image that one process makes of them."""
KILL_S: Final = 60.0
"""Seconds that must be left for killing a denoiser that has 24 GB of weights to load again."""


@torch.no_grad()
def one_process(context: RowContext) -> None:
    """Make images with diffusers alone, then with the engine of the roles, in this process."""
    shapes = flux_shapes(context)
    context.needs(shapes.gpu_gib)
    _reference_in_memory(context, shapes)
    model = _written(context, shapes)
    _release(context)
    use_exact_kernels()
    engine = _loaded(context, model)
    expected = _engine(context, shapes, engine)
    (model / EXPECTED).write_text(expected)
    _same_as_reference(context, shapes, model, engine, expected)


def three_processes(context: RowContext) -> None:
    """Serve the same weights with a process for each stage; make images, measure memory, and kill the denoiser."""
    shapes = flux_shapes(context)
    context.needs(shapes.gpu_gib)
    model = _written(context, shapes)
    _release(context)
    topology = write_topology(context.scratch / "roles", model, "bfloat16", dict.fromkeys(STAGES, 1), 1)
    asyncio.run(_three(context, shapes, model, topology))


async def _three(context: RowContext, shapes: FluxShapes, model: Path, topology: Path) -> None:
    sections: dict[str, dict[str, object]] = {"transfer": {"pool_size": "512MiB" if context.full else "64MiB"}}
    begun = time.perf_counter()
    async with served_cluster(context, topology, STAGES, **sections) as cluster:
        context.value("ready", time.perf_counter() - begun, "s", "interpreters, libraries, weights")
        await cluster.generate(PROMPT, seed=SEED, steps=WARM_UP)
        begun = time.perf_counter()
        drawn = await cluster.generate(PROMPT, seed=SEED)
        context.value("an image", time.perf_counter() - begun, "s", "over HTTP; its prompt was encoded before")
        begun = time.perf_counter()
        other = await cluster.generate(f"{PROMPT}, at night", seed=SEED)
        context.value("an image of a new prompt", time.perf_counter() - begun, "s", "over HTTP")
        (unit,) = (await cluster.request(other.request_id))["units"]
        for stage, seconds in unit["stage_seconds"].items():
            context.value(f"of it, {stage}", seconds, "s")
        await report_memory(context, cluster)
        found = digest(drawn)
        _compare(context, model, found)
        if context.full and context.left_s < KILL_S:
            context.value("kill -9 to the next step", "left out", note="the time was short")
            return
        if shapes.long != shapes.steps:
            found = digest(await cluster.generate(PROMPT, seed=SEED, steps=shapes.long))
        await report_kill(context, cluster, shapes.long, found)


def _compare(context: RowContext, model: Path, found: str) -> None:
    expected = model / EXPECTED
    if not expected.is_file():
        return
    same = expected.read_text() == found
    context.value("bytes equal those of one process", "yes" if same else "no")
    if not same:
        raise RowFailedError("Three processes make another image than one.")


# -- one process


def _reference_in_memory(context: RowContext, shapes: FluxShapes) -> None:
    """Measure diffusers alone on weights that were made on the device, and keep those as files."""
    begun = time.perf_counter()
    parts = {name: with_random_weights(make, context.device) for name, make in shapes.recipe.components.items() if make}
    context.synchronize()
    context.value("weights made", time.perf_counter() - begun, "s", "random, on the device")
    pipeline = FluxPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    prepare(pipeline.transformer, context)
    draw = _draw(pipeline, shapes)
    draw(WARM_UP)
    context.reset_peak()
    context.value("an image, diffusers alone", context.clock(lambda: draw(shapes.steps)), "s", _what(context, shapes))
    context.peak("diffusers alone, one process")
    moments: list[float] = []

    def ended(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        context.synchronize()
        moments.append(time.perf_counter())
        return values

    draw(max(4, shapes.steps // 4), callback_on_step_end=ended)
    context.value("a step, diffusers alone", _between(moments), "s")
    _write(context, shapes, parts)


def _engine(context: RowContext, shapes: FluxShapes, engine: StagePipeline) -> str:
    """Measure encode, each step and decode; returns the digest of the image."""
    _image(context, engine, _request(shapes, WARM_UP))
    inputs = _request(shapes, shapes.steps)
    begun = time.perf_counter()
    state = _timed(context, "encode", lambda: engine.encode(inputs, SEED))
    denoising = engine.denoise(state)
    context.reset_peak()
    moments = [time.perf_counter()]
    while denoising.advance():
        context.synchronize()
        moments.append(time.perf_counter())
    context.peak("denoise, one process")
    made = _timed(context, "decode", lambda: engine.decode(denoising.result()))
    context.value(
        "an image, our engine", time.perf_counter() - begun, "s", f"{_what(context, shapes)}, waiting after each step"
    )
    context.value("a step, our engine", _between(moments), "s")
    return pixels(_first(made))


def _image(context: RowContext, engine: StagePipeline, inputs: dict[str, object]) -> Any:
    denoising = engine.denoise(engine.encode(inputs, SEED))
    while denoising.advance():
        pass
    made = engine.decode(denoising.result())
    context.synchronize()
    return _first(made)


def _same_as_reference(
    context: RowContext, shapes: FluxShapes, model: Path, engine: StagePipeline, expected: str
) -> None:
    """Make an image with the uncut blocks of diffusers on the components that the engine has loaded.

    Not with `FluxPipeline`: in bfloat16 that rounds its timesteps otherwise than the blocks do.
    """
    ours = engine._runner.pipeline
    pipeline = ModularPipeline.from_pretrained(str(model), local_files_only=True)
    pipeline.update_components(**{name: getattr(ours, name) for name in shapes.recipe.components})
    drawn: list[Any] = []

    def draw() -> None:
        generator = torch.Generator("cpu").manual_seed(SEED)
        drawn.append(pipeline(**_request(shapes, shapes.steps), generator=generator, output="images")[0])

    context.value("an image, diffusers' blocks", context.clock(draw), "s", _what(context, shapes))
    same = pixels(drawn[0]) == expected
    context.value("bytes of our engine equal those of diffusers' blocks", "yes" if same else "no")
    if not same:
        raise RowFailedError("Our engine makes another image than the blocks of diffusers.")


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


def _loaded(context: RowContext, model: Path) -> StagePipeline:
    begun = time.perf_counter()
    engine = StagePipeline.load(model, tuple(Stage), dtype=DTYPE, device=context.device)
    context.synchronize()
    context.value("weights loaded", time.perf_counter() - begun, "s", f"by our engine, from {model.parent}")
    prepare(engine._runner.pipeline.transformer, context)
    return engine


def _timed(context: RowContext, what: str, function: Callable[[], dict[str, object]]) -> dict[str, object]:
    made: dict[str, object] = {}
    context.reset_peak()
    context.value(f"{what}, our engine", context.clock(lambda: made.update(function())), "s")
    context.peak(f"{what}, one process")
    return made


def _first(made: dict[str, object]) -> Any:
    images = made["images"]
    return images[0] if isinstance(images, list) else images


def _between(moments: list[float]) -> float:
    """Return the median seconds between moments."""
    return statistics.median(later - earlier for earlier, later in pairwise(moments))


def _what(context: RowContext, shapes: FluxShapes) -> str:
    modes = [f"attention {context.settings.attention}"] if context.settings.attention else []
    modes += ["compiled"] if context.settings.compile else []
    return ", ".join([f"{shapes.side} x {shapes.side}, {shapes.steps} steps, bfloat16", *modes])


def _release(context: RowContext) -> None:
    """Free the unused memory of the GPU."""
    gc.collect()
    if context.cuda:
        torch.cuda.empty_cache()


# -- the files


def _written(context: RowContext, shapes: FluxShapes) -> Path:
    """Return the folder of the model; write it unless an earlier row has."""
    if (model := _find(context)) is not None:
        return model
    parts = {name: with_random_weights(make, context.device) for name, make in shapes.recipe.components.items() if make}
    return _write(context, shapes, parts)


def _find(context: RowContext) -> Path | None:
    folders = [folder / "flux" for folder in scratch_folders(context.scratch)]
    # The index is written when all components are there.
    return next((folder for folder in folders if (folder / "model_index.json").is_file()), None)


def _write(context: RowContext, shapes: FluxShapes, parts: dict[str, Any]) -> Path:
    folder = folder_with_space(context, shapes.nbytes) / "flux"
    begun = time.perf_counter()
    write_model(folder, "flux", recipe_of_components(shapes.recipe, parts), 0, progress=False, save=save)
    nbytes = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    context.value("weights written", time.perf_counter() - begun, "s", f"{nbytes / 1e9:.3g} GB in {folder.parent}")
    return folder
