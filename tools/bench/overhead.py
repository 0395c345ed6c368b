"""Compare an image made by three processes with one made by one process behind the same API.

The model is tiny, so that what is measured is the way and not the work. Both clusters run all the time and are asked in
turn: image by image where there is one at a time, since the speed of a machine changes within seconds.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

from triptych.api.launch import Cluster, launch
from triptych.percentile import percentile
from triptych.tools.bench.clusters import make_model, stdout_to_stderr, write_topology
from triptych.tools.bench.report import compare

IMAGES = 50
"""Latencies in ms for each side, case and round."""
CASES = {"one at a time": 1, "8 in flight": 8}
STAGES = ("encoder", "denoiser", "decoder")
PEER = "monolithic"
SIDES = {"three": STAGES, PEER: (PEER,)}
PERCENTILES = (50, 99)

Latencies = dict[tuple[str, str], list[list[float]]]


def run(rounds: int) -> Iterable[dict[str, object]]:
    """Measure all cases, `rounds` times each, and yield a row for each percentile; times in ms, ratio = peer / ours."""
    # One thread for each process: four with as many as there are cores would wait for each other in spin locks.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder, stdout_to_stderr():
        latencies = asyncio.run(_measure(Path(folder), rounds))
    return _rows(latencies)


def _rows(latencies: Latencies) -> Iterator[dict[str, object]]:
    for case in CASES:
        for percent in PERCENTILES:
            ours, theirs = ([percentile(taken, percent) for taken in latencies[side, case]] for side in SIDES)
            yield compare(
                "overhead",
                f"{case}, p{percent}",
                "ms",
                ours=ours,
                peer=PEER,
                peer_values=theirs,
                higher_is_better=False,
            )


async def _measure(folder: Path, rounds: int) -> Latencies:
    model = folder / "model"
    await asyncio.to_thread(make_model, model, "--family", "flux")
    latencies: Latencies = {(side, case): [] for side in SIDES for case in CASES}
    async with AsyncExitStack() as stack:
        clusters = {
            side: await stack.enter_async_context(launch(_topology(folder / side, model, kinds), {"api": {"port": 0}}))
            for side, kinds in SIDES.items()
        }
        for number in range(rounds + 1):
            for case, in_flight in CASES.items():
                if in_flight == 1:
                    taken = await _in_turn(clusters)
                else:
                    # Neither side is always first, as in `_in_turn`.
                    sides = list(clusters)[:: 1 if number % 2 else -1]
                    taken = {side: await _images(clusters[side], in_flight) for side in sides}
                # The first round warms up.
                if number:
                    for side in clusters:
                        latencies[side, case].append(taken[side])
    return latencies


def _topology(folder: Path, model: Path, kinds: tuple[str, ...]) -> Path:
    # Without a prompt cache, which would skip the encoder from the second image on.
    return write_topology(folder, model, "float32", dict.fromkeys(kinds, 1), slots=8, prompt_cache="0")


async def _in_turn(clusters: dict[str, Cluster]) -> dict[str, list[float]]:
    """Make `IMAGES` images in each cluster, in turn, each first as often; return the milliseconds that each took."""
    taken: dict[str, list[float]] = {side: [] for side in clusters}
    sides = list(clusters)
    for seed in range(IMAGES):
        for side in sides:
            taken[side].append(await _image(clusters[side], seed))
        sides.reverse()
    return taken


async def _images(cluster: Cluster, in_flight: int) -> list[float]:
    """Make `IMAGES` images with `in_flight` at a time; return the milliseconds that each took."""
    seeds = iter(range(IMAGES))

    async def client() -> list[float]:
        return [await _image(cluster, seed) for seed in seeds]

    found = await asyncio.gather(*(client() for _ in range(in_flight)))
    return [each for taken in found for each in taken]


async def _image(cluster: Cluster, seed: int) -> float:
    started = time.perf_counter()
    await cluster.generate("a large red circle", seed=seed)
    return (time.perf_counter() - started) * 1e3
