"""Rows `image` and `kill`: whole clusters of the demo model with their roles on the device."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import httpx
import torch

from triptych.actors.child_state import ChildState
from triptych.actors.runtime.logs import LEVEL_VARIABLE
from triptych.actors.runtime.system_messages import ChildReport
from triptych.api.client import GeneratedImage
from triptych.api.launch import Cluster, launch
from triptych.roles.worker.devices import use_exact_kernels
from triptych.tools.bench.clusters import write_topology
from triptych.tools.gpu_report.machine import nvidia_smi
from triptych.tools.gpu_report.row_context import RowContext, RowFailedError
from triptych.tools.gpu_report.runner import ROOT
from triptych.tools.procfs import process_memory

STAGES: Final = ("encoder", "denoiser", "decoder")
MODEL: Final = ROOT / "examples" / "shapes"
PROMPT: Final = "a large red circle on the left of a blue background"
SEED: Final = 7
IMAGES: Final = 10
LONG: Final = 100
"""Steps of the image in which a process is killed: at least half a second of the demo model."""
OTHERS: Final = "with a second denoiser"
NO_OTHER: Final = "with no other denoiser"
TRIES: Final = 5
"""Most images to try: some may be done before their denoiser is killed."""
POLL_S: Final = 0.01
READY_TIMEOUT_S: Final = 90.0


def image(context: RowContext) -> None:
    """Make an image with three processes and with one; both must equal that of diffusers alone on this device."""
    plain = _plain(context)
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_images(context, Path(folder), plain))


async def _images(context: RowContext, folder: Path, plain: str) -> None:
    wrong = []
    for label, kinds in (("three processes", STAGES), ("one process", ("monolithic",))):
        topology = write_topology(folder / kinds[0], MODEL, "float32", dict.fromkeys(kinds, 1), slots=2)
        begun = time.perf_counter()
        async with served_cluster(context, topology, kinds) as cluster:
            context.value(f"ready, {label}", time.perf_counter() - begun, "s", "interpreters, libraries, weights")
            drawn = await cluster.generate(PROMPT, seed=SEED)
            same = digest(drawn) == plain
            context.value(f"bytes of {label} equal those of diffusers", "yes" if same else "no")
            wrong += [] if same else [label]
            taken = [await _seconds(cluster, seed) for seed in range(IMAGES)]
            context.value(f"an image, {label}", 1e3 * statistics.median(taken), "ms", f"p50 of {IMAGES}, over HTTP")
            await report_memory(context, cluster)
    if wrong:
        raise RowFailedError(f"Another image than that of diffusers alone, by {' and by '.join(wrong)}.")


async def _seconds(cluster: Cluster, seed: int) -> float:
    begun = time.perf_counter()
    await cluster.generate(PROMPT, seed=seed)
    return time.perf_counter() - begun


def _plain(context: RowContext) -> str:
    """Return the digest of the image of diffusers alone."""
    from diffusers import FluxPipeline

    pipeline = FluxPipeline.from_pretrained(MODEL, torch_dtype=torch.float32).to(context.device)
    pipeline.set_progress_bar_config(disable=True)
    given = json.loads((MODEL / "triptych.json").read_text())["defaults"]

    def draw() -> Any:
        return pipeline(PROMPT, generator=torch.Generator("cpu").manual_seed(SEED), **given).images[0]

    context.value("an image, diffusers alone", 1e3 * context.median(draw, IMAGES), "ms", "no HTTP, no other process")
    usual = pixels(draw())
    use_exact_kernels()
    exact = pixels(draw())
    if usual != exact:
        context.value(
            "bytes of diffusers alone", "differ", note="between its own kernels and deterministic ones, as roles use"
        )
    return exact


def kill(context: RowContext) -> None:
    """Kill a denoiser in the middle of its steps; measure until the next step, and compare the images."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_kill(context, Path(folder)))


async def _kill(context: RowContext, folder: Path) -> None:
    model = _with_many_steps(folder / "model")
    topology = write_topology(folder / "cluster", model, "float32", {"encoder": 1, "denoiser": 2, "decoder": 1}, 1)
    async with served_cluster(context, topology, STAGES) as cluster:
        undisturbed = await cluster.generate(PROMPT, seed=SEED, steps=LONG)
        for how in (OTHERS, NO_OTHER):
            await report_kill(context, cluster, LONG, digest(undisturbed), how)


def _with_many_steps(folder: Path) -> Path:
    """Link the files of the demo model in a folder, with a serving config that allows so many steps."""
    folder.mkdir()
    for path in MODEL.iterdir():
        if path.name != "triptych.json":
            (folder / path.name).symlink_to(path)
    serving_config = json.loads((MODEL / "triptych.json").read_text())
    serving_config["ranges"]["num_inference_steps"] = [1, LONG]
    (folder / "triptych.json").write_text(json.dumps(serving_config))
    return folder


# -- for every cluster


@asynccontextmanager
async def served_cluster(
    context: RowContext, topology: Path, kinds: Iterable[str], **sections: dict[str, object]
) -> AsyncIterator[Cluster]:
    """Run a topology with its roles on the device."""
    os.environ.setdefault(LEVEL_VARIABLE, "warning")
    device = {"device": context.settings.device}
    overrides: dict[str, dict[str, object]] = {
        "api": {"port": 0},
        "roles": dict.fromkeys(kinds, device),
        # A GPU is asked for gigabytes at a time, and then the process may be silent for longer than usual.
        "supervision": {"heartbeat_timeout_s": 60},
        **sections,
    }
    async with launch(topology, overrides, ready_timeout_s=max(context.left_s, 10.0)) as cluster:
        yield cluster


class RequestStatus(NamedTuple):
    """The state of the only image of a request."""

    state: str
    step: int
    causes: int
    instance: str


async def report_kill(context: RowContext, cluster: Cluster, steps: int, expected: str, how: str = NO_OTHER) -> None:
    """Kill a denoiser halfway through an image; raises RowFailedError where that becomes another image.

    Args:
        context: Of the row.
        cluster: Which serves.
        steps: Of the image.
        expected: Digest of the undisturbed image.
        how: `OTHERS`, or `NO_OTHER` to kill all denoisers at once.
    """
    async with httpx.AsyncClient(base_url=cluster.url, timeout=30.0) as client:
        for _ in range(TRIES):
            path = await _killed(context, cluster, client, steps, how)
            if path:
                break
        else:
            raise RowFailedError(f"{TRIES} images were done before their denoiser could be killed.")
        story = await _ended(client, path)
        if _request_status(story).state == "failed":
            raise RowFailedError(f"The image failed: {story['units'][0]['causes']}")
        recovered = await client.get(story["units"][0]["artifact"]["url"])
        same = pixels(GeneratedImage(recovered.content, "").image()) == expected
        context.value(f"bytes after the kill are the same, {how}", "yes" if same else "no")
        if not same:
            raise RowFailedError("The image whose denoiser was killed is another one.")


async def _killed(context: RowContext, cluster: Cluster, client: httpx.AsyncClient, steps: int, how: str) -> str:
    """Request an image and kill its denoiser; return the path of the request, "" if it was done before."""
    children = await _all_ready(cluster)
    body = {"prompt": PROMPT, "seed": SEED, "num_inference_steps": steps}
    answer = await client.post("/v1/images/generations", json=body, headers={"Prefer": "respond-async"})
    answer.raise_for_status()
    path = f"/v1/requests/{answer.headers['x-request-id']}"
    told = await _until_step(client, path, steps // 2, 0)
    if told is None:
        return ""
    victims = [child for child in children if child.kind == "denoiser"]
    begun = time.perf_counter()
    for child in victims:
        if how == NO_OTHER or child.name == told.instance:
            os.kill(child.pid, signal.SIGKILL)
    if await _until_step(client, path, 1, told.causes + 1) is None:
        return ""
    seconds = time.perf_counter() - begun
    context.value(f"kill -9 to the next step, {how}", seconds, "s", f"killed in step {told.step} of {steps}")
    return path


async def _until_step(client: httpx.AsyncClient, path: str, step: int, causes: int) -> RequestStatus | None:
    """Wait for a step after so many lost attempts; return None if the request ends before."""
    async with asyncio.timeout(READY_TIMEOUT_S):
        while True:
            view = (await client.get(path)).json()
            if view["terminal"]:
                return None
            told = _request_status(view)
            if told.step >= step and told.causes >= causes:
                return told
            await asyncio.sleep(POLL_S)


async def _all_ready(cluster: Cluster) -> list[ChildReport]:
    """Wait until every process is ready; a cluster takes requests before the last one is."""
    async with asyncio.timeout(READY_TIMEOUT_S):
        while True:
            children = list((await cluster.children()).values())
            if all(child.state == ChildState.READY for child in children):
                return children
            await asyncio.sleep(POLL_S)


async def _ended(client: httpx.AsyncClient, path: str) -> dict[str, Any]:
    """Wait until a request has ended; return its JSON object."""
    async with asyncio.timeout(READY_TIMEOUT_S):
        while True:
            view: dict[str, Any] = (await client.get(path)).json()
            if view["terminal"]:
                return view
            await asyncio.sleep(POLL_S)


def _request_status(view: dict[str, Any]) -> RequestStatus:
    (unit,) = view["units"]
    return RequestStatus(
        view["state"].lower(), unit["step"], len(unit["causes"]), unit["instances"].get("denoiser", "")
    )


async def report_memory(context: RowContext, cluster: Cluster) -> None:
    """Report the memory of each role: of the GPU where it has one, else the peak of its process."""
    facts = {
        row["component"]: row["facts"]
        for row in (await cluster.status())["actors"]
        if "stages_run" in row.get("facts", {})
    }
    children = await cluster.children()
    on_gpu = _by_process()
    for name, said in facts.items():
        if not context.cuda:
            peak = process_memory(children[name].pid).peak_rss
            context.value(f"memory of {name}", peak / 1024, "GiB", "peak of the process, host memory")
            continue
        allocated, reserved = (said.get(f"device_peak_{kind}_bytes", 0) / 2**30 for kind in ("allocated", "reserved"))
        whole = on_gpu.get(children[name].pid)
        note = f"peak allocated; reserved {reserved:.2f} GiB"
        note += f"; {whole:.2f} GiB now by nvidia-smi" if whole is not None else ""
        context.value(f"memory of {name}", allocated, "GiB", note)


def _by_process() -> dict[int, float]:
    """Return GiB of the GPU by process id, as far as nvidia-smi sees processes here."""
    used = {}
    for line in nvidia_smi("--query-compute-apps=pid,used_memory").splitlines():
        pid, _, mib = line.partition(",")
        if pid.strip().isdigit() and mib.strip().isdigit():
            used[int(pid)] = int(mib) / 1024
    return used


def digest(drawn: GeneratedImage) -> str:
    """Return the digest of an image's pixels."""
    return pixels(drawn.image())


def pixels(image: Any) -> str:
    """Return the SHA-256 of the RGB bytes of a `PIL.Image.Image`."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
