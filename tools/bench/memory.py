"""Measure the memory of each process for a mid-size model, against one monolithic process that loads all of it.

A model of some 2 GB with random weights is made and served by the real system, once in three roles and once in one, and
each again with one instance more. A process is measured when it is ready and when it has made images; its peak is the
kernel's. On the CPU a role maps weights from their files where they are saved in the dtype that is served: those pages
are read with the first image, and shared by all processes of a host. So there is a second case, in which weights are
converted as they are loaded: then each process has its own, as it has on a GPU.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Final, NamedTuple

from triptych.actors.child_state import ChildState
from triptych.api.launch import Cluster, launch
from triptych.engines.memory.arena import available_memory
from triptych.tools.bench import memory_page, memory_report
from triptych.tools.bench.clusters import make_model, stdout_to_stderr, write_topology
from triptych.tools.bench.memory_report import CONVERTED, MAPPED, MemoryRun, ProcessSample
from triptych.tools.procfs import ProcessMemory, children_of, process_memory

ROUNDS: Final = 1
"""Default number of rounds; every round starts eight clusters."""
FAMILY: Final = "flux-kl"
SIZE: Final = "512x512"
STEPS: Final = 2
IMAGES: Final = 2
MOST_IMAGES: Final = 8
"""Most images to make until each instance has run a stage."""
IMAGE_S: Final = 300.0
READY_S: Final = 180.0
SETTLE_S: Final = 1.0
"""Seconds from the answer to the measurement, in which roles free what they no longer need."""
NEEDED_MIB: Final = 10_000

DTYPES: Final = {MAPPED: "bfloat16", CONVERTED: "float16"}
"""The dtype that roles load; the files are in bfloat16, so float16 is converted."""
STAGES: Final = {"encoder": 1, "denoiser": 1, "decoder": 1}
SIDES: Final = {
    memory_report.DISAGGREGATED: STAGES,
    memory_report.MORE_DENOISERS: {**STAGES, "denoiser": 2},
    memory_report.MONOLITHIC: {"monolithic": 1},
    memory_report.MORE_MONOLITHIC: {"monolithic": 2},
}

markdown = memory_page.markdown


class _Model(NamedTuple):
    """A model, and the weights of its components in MiB."""

    model: Path
    weights: dict[str, float]


def run(rounds: int) -> Iterable[dict[str, object]]:
    """Start every side `rounds` times; yield the settings, a row for each process, and the comparisons, in MiB."""
    if (available := available_memory() / 2**20) < NEEDED_MIB:
        sys.exit(f"This takes {NEEDED_MIB} MiB of memory, and {available:.0f} are available.")
    with tempfile.TemporaryDirectory(prefix="memory-") as folder, stdout_to_stderr():
        model = Path(folder) / "model"
        make_model(model, "--family", FAMILY, "--size", "mid")
        place = _Model(model, _weights(model))
        runs = [
            asyncio.run(_run(Path(folder) / f"{number}-{weights}-{side}", place, weights, side))
            for number in range(rounds)
            for weights in DTYPES
            for side in SIDES
        ]
    yield {"bench": "memory", "case": "settings", **_settings(rounds, place.weights)}
    yield from memory_report.rows(runs)


def _settings(rounds: int, weights: dict[str, float]) -> dict[str, object]:
    libraries = {name: version(name) for name in ("torch", "diffusers", "transformers")}
    return {
        "model": f"{FAMILY}, mid",
        "weights": {name: round(mib) for name, mib in weights.items()},
        "dtypes": DTYPES,
        "size": SIZE,
        "num_inference_steps": STEPS,
        "images": IMAGES,
        "rounds": rounds,
        **libraries,
    }


def _weights(model: Path) -> dict[str, float]:
    folders = sorted(path for path in model.iterdir() if path.is_dir())
    sizes = {folder.name: sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in folders}
    return {name: nbytes / 2**20 for name, nbytes in sizes.items()}


async def _run(folder: Path, place: _Model, weights: str, side: str) -> MemoryRun:
    print(f"memory: {weights} weights, {side}", file=sys.stderr)
    topology = write_topology(folder, place.model, DTYPES[weights], SIDES[side], slots=1)
    async with launch(topology, {"api": {"port": 0}}, ready_timeout_s=READY_S) as cluster:
        await _wait_for_all_ready(cluster)
        ready = await _measure(cluster)
        # Weights that are converted are there from the start: images would only cost time.
        if weights == MAPPED:
            await _warm_up(cluster, set(ready))
        done = await _measure(cluster)
        loaded = await _components(cluster, place.weights)
    parts = {name: loaded.get(name, ()) for name in done}
    sizes = {name: sum(place.weights[part] for part in parts[name]) for name in done}
    return MemoryRun(
        weights, side, {name: ProcessSample(parts[name], sizes[name], ready[name], done[name]) for name in done}
    )


async def _wait_for_all_ready(cluster: Cluster) -> None:
    """Wait for every instance; a cluster is ready as soon as it has one of each kind."""
    async with asyncio.timeout(READY_S):
        while {child.state for child in (await cluster.children()).values()} != {ChildState.READY}:  # noqa: ASYNC110  has to ask
            await asyncio.sleep(SETTLE_S)
    await asyncio.sleep(SETTLE_S)


async def _warm_up(cluster: Cluster, names: set[str]) -> None:
    """Make images of distinct prompts until each instance has run a stage."""
    idle = {component.name for component in cluster.topology.components if component.slots} & names
    for number in count(1):
        made = await cluster.generate(f"{number} red ships", size=SIZE, steps=STEPS, seed=number, timeout_s=IMAGE_S)
        (unit,) = (await cluster.request(made.request_id))["units"]
        idle -= set(unit["instances"].values())
        if number >= IMAGES and not idle:
            break
        if number == MOST_IMAGES:
            raise RuntimeError(f"{', '.join(sorted(idle))} had no part in {number} images")
    await asyncio.sleep(SETTLE_S)


async def _measure(cluster: Cluster) -> dict[str, ProcessMemory]:
    """Measure every process of the cluster, by name."""
    pids = {name: child.pid for name, child in (await cluster.children()).items()}
    supervisor = cluster.process.pid
    (zygote,) = set(children_of(supervisor)) - set(pids.values())
    return {name: process_memory(pid) for name, pid in {**pids, "supervisor": supervisor, "zygote": zygote}.items()}


async def _components(cluster: Cluster, weights: dict[str, float]) -> dict[str, tuple[str, ...]]:
    """Return the components with weights that each role reports as loaded, by the name of the role."""
    actors = (await cluster.status())["actors"]
    facts = {row["component"]: row["facts"] for row in actors if "stages_run" in row.get("facts", {})}
    named = {name: said["components"].split(", ") for name, said in facts.items()}
    return {name: tuple(part for part in parts if weights.get(part)) for name, parts in named.items()}
