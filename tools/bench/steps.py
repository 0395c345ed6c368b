"""Measure the step scheduler: batches, the cost of stepping, policies, cancellation and checkpoints.

The demo model is served by real clusters of three roles, which run all the time and are asked in turn; the peer is
diffusers in one process. One thread for each process. Deadlines are measured by `tools.simulate.policies`.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AsyncExitStack
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import httpx
import torch
from diffusers import FluxPipeline

from triptych.actors.runtime.address_book import AddressBook
from triptych.api.launch import Cluster, launch
from triptych.bus import Outbox
from triptych.engines.memory.streams import DeviceStream
from triptych.engines.pipelines.pipeline import StagePipeline
from triptych.engines.stages import Stage
from triptych.engines.steps.executor import StepExecutor
from triptych.roles.head.job import TERMINAL_STATES
from triptych.roles.messages.common import Attempt, Output
from triptych.roles.messages.pool import PoolDescription, PoolQuery
from triptych.roles.worker.attempts import ActiveAttempt, Phase
from triptych.roles.worker.step_scheduler import StepScheduler
from triptych.roles.worker.stream_worker import SHORT_STEPS_S
from triptych.tools.bench.clusters import allow_steps, stdout_to_stderr, write_topology
from triptych.tools.bench.report import compare
from triptych.tools.simulate.policies import DEADLINE_FACTOR
from triptych.tools.simulate.policies import STEPS as MIX

ROUNDS: Final = 5
MODEL: Final = Path(str(files("triptych"))) / "examples" / "shapes"
PROMPT: Final = "a large red circle on the left of a blue background"
ROLES: Final = {"encoder": 1, "denoiser": 1, "decoder": 1}
IN_FLIGHT: Final = 8
STEPS: Final = 20
LONG_STEPS: Final = 50
SHORT_STEPS: Final = 4
LONG_REQUESTS: Final = 5
ENDLESS_STEPS: Final = 10_000
GRACE_MS: Final = 20.0
"""What a cancellation may take beyond the step that computes."""
KILL_STEP: Final = 40
"""Step of LONG_STEPS at which a denoiser is killed."""
CHECKPOINT_S: Final = 0.1
"""Seconds between two of its checkpoints: those of about ten steps."""
TIMEOUT_S: Final = 20.0
POLL_S: Final = 0.002
DENOISERS: Final[dict[str, dict[str, object]]] = {
    "max_batch = 1": {"policy": "fifo"},
    "max_batch = 8": {"policy": "fifo", "max_batch": IN_FLIGHT},
    "fair": {"policy": "fair"},
    "shortest_remaining": {"policy": "shortest_remaining"},
    "deadline": {"policy": "deadline"},
}
"""The clusters by name, and the settings of their denoisers; the head has the same policy."""
DEADLINE_REQUESTS: Final = 30
STEPPING_PAIRS: Final = 14
"""Denoises with and without pauses in a round: their difference is smaller than that of two equal ones."""
DEADLINE_LOAD: Final = 0.75
"""Work that arrives, as a share of what requests take alone. How many deadlines `fifo` then meets is up to the trace:
27 to 97 % in the rounds of docs/measured.md."""
POLICIES: Final = {"fifo": "max_batch = 1", "fair": "fair", "shortest_remaining": "shortest_remaining"}
"""The cluster of each policy."""

Values = dict[str, list[float]]


def run(rounds: int) -> Iterable[dict[str, object]]:
    """Measure all cases, `rounds` times each, and yield their rows."""
    # One thread for each process: more than there are cores would wait for each other in spin locks.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="steps-") as folder, stdout_to_stderr():
        values = asyncio.run(_measure(Path(folder), rounds))
    return _rows(values)


def _rows(values: Values) -> Iterator[dict[str, object]]:
    def row(case: str, unit: str, peer: str, *, higher_is_better: bool = False) -> dict[str, object]:
        return compare(
            "steps",
            case,
            unit,
            ours=values[case],
            peer=peer,
            peer_values=values[f"{case} / {peer}"],
            higher_is_better=higher_is_better,
        )

    yield row(f"{IN_FLIGHT} in flight, denoiser alone", "images/s", "max_batch = 1", higher_is_better=True)
    yield row(f"{IN_FLIGHT} in flight, whole requests", "images/s", "max_batch = 1", higher_is_better=True)
    yield row(f"{IN_FLIGHT} in flight, whole requests", "images/s", PEER, higher_is_better=True)
    yield row("one denoise, stepped and scheduled", "ms", "without pauses")
    for policy in POLICIES:
        yield row(f"{SHORT_STEPS} steps among {LONG_STEPS}, {policy}", "ms", "alone")
    for policy in POLICIES:
        yield row(f"mean of all, {policy}", "ms", "fifo")
    yield row("deadlines of 3 times alone met, deadline", "share", "fifo", higher_is_better=True)
    for cluster in ("max_batch = 1", "max_batch = 8"):
        yield row(f"cancel to memory back, {cluster}", "ms", f"one step + {GRACE_MS:g} ms")
    yield row(f"{KILLED}, work redone", "ms", "checkpoint_s")
    yield row(f"{KILLED}, steps redone", "steps", "without checkpoints")


KILLED: Final = f"denoiser killed at step {KILL_STEP} of {LONG_STEPS}"
PEER: Final = f"diffusers, num_images_per_prompt = {IN_FLIGHT}"


async def _measure(folder: Path, rounds: int) -> Values:
    model = folder / "model"
    shutil.copytree(MODEL, model)
    allow_steps(model, ENDLESS_STEPS)
    local = _Local(model)
    values: Values = defaultdict(list)
    async with AsyncExitStack() as stack:
        clusters = {}
        for name, settings in DENOISERS.items():
            # Without a prompt cache, which would skip the encoder from the second image on.
            file = write_topology(
                folder / name.replace(" ", ""), model, "float32", ROLES, slots=IN_FLIGHT, prompt_cache="0"
            )
            overrides: dict[str, dict[str, object]] = {"api": {"port": 0}, "roles": {"denoiser": settings}}
            overrides["head"] = {"policy": settings["policy"]}
            clusters[name] = await stack.enter_async_context(launch(file, overrides))
        file = write_topology(
            folder / "checkpoints", model, "float32", ROLES | {"denoiser": 2}, slots=IN_FLIGHT, prompt_cache="0"
        )
        overrides = {"api": {"port": 0}, "roles": {"denoiser": {"checkpoint_s": CHECKPOINT_S}}}
        overrides["supervision"] = {"intensity": 2 * (rounds + 1)}
        with_checkpoints = await stack.enter_async_context(launch(file, overrides))
        for number in range(rounds + 1):
            measured: Values = defaultdict(list)
            await _throughput(clusters, local, measured, reverse=number % 2 == 0)
            await _stepping(local, measured)
            for policy, name in POLICIES.items():
                await _policy(clusters[name], policy, measured)
            await _deadlines(clusters, number, measured)
            for name in ("max_batch = 1", "max_batch = 8"):
                await _cancel(clusters[name], name, measured)
            await _kill(with_checkpoints, measured)
            # The first round warms up.
            if number:
                for case, found in measured.items():
                    values[case] += found
    for policy in POLICIES:
        values[f"mean of all, {policy} / fifo"] = values["mean of all, fifo"]
    return values


async def _throughput(clusters: dict[str, Cluster], local: _Local, values: Values, *, reverse: bool) -> None:
    """Make two images for each that is in flight, in each cluster, and as many with diffusers alone.

    With `reverse` the last side is first: no side is to follow the same one in each round.
    """
    whole, alone = f"{IN_FLIGHT} in flight, whole requests", f"{IN_FLIGHT} in flight, denoiser alone"

    async def requests(cluster: Cluster, suffix: str) -> None:
        seeds = iter(range(2 * IN_FLIGHT))

        async def client() -> None:
            for seed in seeds:
                await cluster.generate(f"{PROMPT} {seed}", seed=seed, steps=STEPS)

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(IN_FLIGHT)))
        values[whole + suffix].append(2 * IN_FLIGHT / (time.perf_counter() - began))

    async def diffusers() -> None:
        values[f"{whole} / {PEER}"].append(IN_FLIGHT / await _timed(local.diffusers_batch()))

    async def denoises(bucket: int, suffix: str) -> None:
        values[alone + suffix].append(IN_FLIGHT / await _timed(local.denoise_together(bucket)))

    sides: list[Callable[[], Awaitable[None]]] = [
        partial(requests, clusters["max_batch = 8"], ""),
        partial(requests, clusters["max_batch = 1"], " / max_batch = 1"),
        diffusers,
        partial(denoises, IN_FLIGHT, ""),
        partial(denoises, 1, " / max_batch = 1"),
    ]
    for side in reversed(sides) if reverse else sides:
        await side()


async def _stepping(local: _Local, values: Values) -> None:
    """Denoise one request as a worker does that has nothing else to do, and in one piece."""
    case = "one denoise, stepped and scheduled"
    sides = [(local.denoise_stepped, ""), (local.denoise_at_once, " / without pauses")]
    # A difference of some percent needs many pairs, and neither side always first.
    for _ in range(STEPPING_PAIRS):
        sides.reverse()
        for denoise, suffix in sides:
            values[case + suffix].append(await _timed(denoise()) * 1e3)


async def _policy(cluster: Cluster, policy: str, values: Values) -> None:
    """Send a short request when long ones are being denoised."""
    alone = await _seconds(cluster, SHORT_STEPS)
    longs = [asyncio.create_task(_seconds(cluster, LONG_STEPS)) for _ in range(LONG_REQUESTS)]
    await _until_stepping(cluster, LONG_REQUESTS)
    short = await _seconds(cluster, SHORT_STEPS)
    everything = [short, *await asyncio.gather(*longs)]
    case = f"{SHORT_STEPS} steps among {LONG_STEPS}, {policy}"
    values[case].append(short * 1e3)
    values[f"{case} / alone"].append(alone * 1e3)
    values[f"mean of all, {policy}"].append(statistics.mean(everything) * 1e3)


async def _deadlines(clusters: dict[str, Cluster], seed: int, values: Values) -> None:
    """Send one trace of mixed requests with deadlines to a cluster under `deadline` and to one under `fifo`."""
    case = "deadlines of 3 times alone met, deadline"
    alone = {steps: min([await _seconds(clusters["deadline"], steps) for _ in range(3)]) for steps in MIX}
    choose = random.Random(seed)
    steps = choose.choices(list(MIX), list(MIX.values()), k=DEADLINE_REQUESTS)
    gap_s = statistics.mean(alone[each] for each in steps) / DEADLINE_LOAD
    trace = [(each, choose.expovariate(1.0) * gap_s) for each in steps]
    sides = (("deadline", ""), ("max_batch = 1", " / fifo"))
    for name, suffix in sides if seed % 2 else reversed(sides):
        cluster = clusters[name]
        sent = []
        for each, pause_s in trace:
            await asyncio.sleep(pause_s)
            wanted_s = DEADLINE_FACTOR * alone[each]
            request = cluster.generate(PROMPT, seed=1, steps=each, deadline_s=wanted_s)
            sent.append(asyncio.create_task(request))
        views = [await cluster.request(image.request_id) for image in await asyncio.gather(*sent)]
        values[case + suffix].append(statistics.mean(view["deadline_met"] for view in views))


async def _seconds(cluster: Cluster, steps: int) -> float:
    began = time.perf_counter()
    await cluster.generate(PROMPT, seed=1, steps=steps)
    return time.perf_counter() - began


async def _until_stepping(cluster: Cluster, count: int) -> None:
    """Wait until the denoiser holds so many requests."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            if len(_denoiser(await cluster.status())["running"]) >= count:
                return
            await asyncio.sleep(POLL_S)


def _denoiser(status: dict[str, Any]) -> dict[str, Any]:
    return next(each for each in status["actors"] if each["name"] == "denoiser-0")


async def _cancel(cluster: Cluster, name: str, values: Values) -> None:
    """Cancel one request among as many as can be in a batch, and wait until the pool has its block back."""
    case = f"cancel to memory back, {name}"
    count = IN_FLIGHT if name == "max_batch = 8" else 1
    outbox = Outbox("bench")
    pool = outbox.reference("pool", AddressBook(cluster.topology).address("pool"))

    async def leased() -> int:
        return (await pool.ask(PoolQuery(), PoolDescription, timeout_s=TIMEOUT_S)).leased

    async def until_leased(most: int) -> None:
        """Wait until at most so many bytes are leased."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                if await leased() <= most:
                    return
                await asyncio.sleep(POLL_S)

    async with cluster.http_client(TIMEOUT_S) as http:
        before = await leased()
        ids = [await _submitted(http, seed) for seed in range(count)]
        for id_ in ids:
            steps, seconds = await _progress(cluster, id_, 10)
        held = await leased()
        began = time.perf_counter()
        await http.delete(f"/v1/requests/{ids[0]}")
        await until_leased(held - 1)
        values[case].append((time.perf_counter() - began) * 1e3)
        values[f"{case} / one step + {GRACE_MS:g} ms"].append(seconds / steps * 1e3 + GRACE_MS)
        for id_ in ids[1:]:
            await http.delete(f"/v1/requests/{id_}")
        await until_leased(before)
    outbox.close()


async def _kill(cluster: Cluster, values: Values) -> None:
    """Kill the denoiser of a request that is nearly done, and compare the image with that of an undisturbed run."""
    await cluster.wait_ready(TIMEOUT_S)
    expected = await cluster.generate(f"{PROMPT} 0", seed=0, steps=LONG_STEPS)
    undisturbed = (await cluster.request(expected.request_id))["units"][0]
    step_ms = undisturbed["stage_seconds"][Stage.DENOISER.value] / LONG_STEPS * 1e3
    children = await cluster.children()

    async def until(reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                job: dict[str, Any] = (await cluster.request(id_))["units"][0]
                if reached(job):
                    return job
                await asyncio.sleep(POLL_S)

    async with cluster.http_client(TIMEOUT_S) as http:
        id_ = await _submitted(http, 0, LONG_STEPS)
        job = await until(lambda job: job["step"] >= KILL_STEP)
        os.kill(children[job["instances"][Stage.DENOISER.value]].pid, signal.SIGKILL)
        job = await until(lambda job: job["state"] in TERMINAL_STATES)
        if not job["causes"]:
            raise RuntimeError(f"{id_} was denoised before its denoiser was killed")
        image = (await http.get(job["artifact"]["url"])).raise_for_status().content
    if image != expected.data:
        raise RuntimeError(f"{id_} has other bytes than in an undisturbed run, after step {job['resumed_from']}")
    values[f"{KILLED}, work redone"].append(job["steps_redone"] * step_ms)
    values[f"{KILLED}, work redone / checkpoint_s"].append(CHECKPOINT_S * 1e3)
    values[f"{KILLED}, steps redone"].append(job["steps_redone"])
    values[f"{KILLED}, steps redone / without checkpoints"].append(job["resumed_from"] + job["steps_redone"])


async def _submitted(http: httpx.AsyncClient, seed: int, steps: int = ENDLESS_STEPS) -> str:
    # Requests with one prompt that come together are encoded once, and share a block.
    body = {"prompt": f"{PROMPT} {seed}", "num_inference_steps": steps, "seed": seed}
    answer = await http.post("/v1/images/generations", json=body, headers={"Prefer": "respond-async"})
    return str(answer.raise_for_status().json()["id"])


async def _progress(cluster: Cluster, id_: str, steps: int) -> tuple[int, float]:
    """Wait until a request has taken so many steps more; the steps, and the seconds that they took."""
    first, began = 0, 0.0
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            step = (await cluster.request(id_))["units"][0]["step"]
            now = time.perf_counter()
            if not first and step:
                first, began = step, now
            elif first and step >= first + steps:
                return step - first, now - began
            await asyncio.sleep(POLL_S)


async def _timed(work: Awaitable[None]) -> float:
    began = time.perf_counter()
    await work
    return time.perf_counter() - began


class _Local:
    """The model in this process: the denoiser as a worker has it, and diffusers' own pipeline."""

    def __init__(self, model: Path) -> None:
        device = torch.device("cpu")
        self._pipeline = StagePipeline.load(model, tuple(Stage), dtype=torch.float32, device=device)
        self._diffusers: Any = FluxPipeline.from_pretrained(model, dtype=torch.float32)
        self._diffusers.set_progress_bar_config(disable=True)
        self._stream = DeviceStream(device, "compute")
        self._executor = StepExecutor()
        config = json.loads((model / "triptych.json").read_text())
        self._inputs = {**config["defaults"], "prompt": PROMPT}
        self._payloads = [self._payload(STEPS, seed) for seed in range(IN_FLIGHT)]
        self._long_payload = self._payload(LONG_STEPS, 0)

    async def denoise_at_once(self) -> None:
        """Denoise one request in one call, as the pipeline does that diffusers runs."""

        def work() -> None:
            denoising = self._pipeline.denoise(self._long_payload)
            denoising.pause = lambda: None  # type: ignore[method-assign]
            denoising.advance()

        await self._stream.run(work)

    async def denoise_stepped(self) -> None:
        """Denoise the same request in the calls that the stream worker makes."""
        scheduler = StepScheduler("fifo", 1)
        item = ActiveAttempt(Attempt("r/0", 1), Phase.RUNNING, (Stage.DENOISER,), Output(), deadline=math.inf)
        scheduler.add(item)
        denoising = await self._stream.run(self._pipeline.denoise, self._long_payload)
        more = True
        while more:
            began = time.monotonic()
            chosen = scheduler.next(began)
            rounds = await self._stream.run(self._executor.advance_for, [denoising], SHORT_STEPS_S, lambda: False)
            scheduler.stepped(item.attempt, denoising.step, denoising.total_steps, denoising.batch_key)
            self._stream.record()
            for taken in rounds:
                scheduler.ran(chosen, taken.ended - began)
                began = taken.ended
            more = rounds[-1].results[0].more

    async def denoise_together(self, bucket: int) -> None:
        """Denoise as many requests as are in flight, a step of each in turn, in batches of a bucket."""
        runs = [await self._stream.run(self._pipeline.denoise, payload, bucket) for payload in self._payloads]
        while runs:
            results = await self._stream.run(self._executor.advance, runs)
            runs = [run for run, result in zip(runs, results, strict=True) if result.more]

    async def diffusers_batch(self) -> None:
        """Make as many images as are in flight in one call of diffusers."""
        inputs = {**self._inputs, "num_inference_steps": STEPS}
        await self._stream.run(self._diffusers, **inputs, num_images_per_prompt=IN_FLIGHT)

    def _payload(self, steps: int, seed: int) -> dict[str, object]:
        return self._pipeline.encode({**self._inputs, "num_inference_steps": steps}, seed)
