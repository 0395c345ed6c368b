"""HTTP: requests accepted in a second, against Ray Serve's echo; clients with open event streams; the page.

A request is accepted when its 202 is there: it has been checked, and is on the disk. Ray Serve answers 202 with what it
was sent. Both have the same client and take turns. While requests are accepted the instances are stopped: a system with
GPUs does not compute on the cores that accept.

Ray is in an environment of its own, which `make bench-http` makes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import uvloop

from triptych.actors.topology import free_port
from triptych.api.launch import Cluster, launch
from triptych.percentile import percentile
from triptych.tools.bench.clusters import allow_steps, make_model, stdout_to_stderr
from triptych.tools.bench.http_load import connect, rate, request_bytes
from triptych.tools.bench.report import compare
from triptych.tools.procfs import process_memory

ROUNDS: Final = 3
SECONDS: Final = 60.0
"""Of the load with event streams."""
CLIENTS: Final = 200
"""Open event streams."""
PER_SECOND: Final = 20
"""Requests for images in a second, while these are open."""
PAGE_GOAL_MS: Final = 50.0
ACCEPT_GOAL: Final = 8.0
"""Requests accepted for each that Ray Serve echoes."""
RAY_VARIABLE: Final = "TRIPTYCH_RAY_PYTHON"
_ROOT: Final = Path(__file__).parents[2]
_IN_FLIGHT: Final = (1, 64)
_ACCEPT_S: Final = 3.0
_WARM_UP_S: Final = 0.5
_SETTLE_S: Final = 2.0
_PAGES: Final = 50
_PATIENCE_S: Final = 120.0
_MANY_STEPS: Final = 100_000
_BODY: Final = {"prompt": "a large red circle", "seed": 1, "num_inference_steps": 4}
_SERVERS: Final = ("api", "head")
_TOPOLOGY: Final = """
[model]
path = "{model}"
dtype = "float32"
[state]
path = "{state}"
[head]
max_pending = {max_pending}
request_timeout_s = 3600
[supervision]
heartbeat_timeout_s = 3600
[[roles]]
kind = "encoder"
slots = 8
[[roles]]
kind = "denoiser"
count = 2
slots = 1
[[roles]]
kind = "decoder"
slots = 8
"""
"""The second denoiser holds the request that all clients follow. Nobody takes a process for hung that is stopped."""


def run(rounds: int, seconds: float = SECONDS) -> Iterator[dict[str, Any]]:
    """Yield the rows of accepted requests, of `seconds` with open event streams, and of the page where there is one."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="http-") as name:
        folder = Path(name)
        with stdout_to_stderr():
            make_model(folder / "model", "--family", "flux")
            allow_steps(folder / "model", _MANY_STEPS)
        with stdout_to_stderr(), _ray_serve() as ray_port:
            rates = uvloop.run(_accepted(_write(folder, "accept", 10_000_000), ray_port, rounds))
        for in_flight in _IN_FLIGHT:
            row = compare(
                "http",
                f"requests accepted, {in_flight} in flight",
                "requests/s",
                ours=rates["triptych", in_flight],
                peer="Ray Serve's echo",
                peer_values=rates["ray", in_flight],
            )
            yield {**row, "goal": ACCEPT_GOAL}
        with stdout_to_stderr():
            page, load = uvloop.run(_streamed(_write(folder, "streams", 256), seconds))
        yield from _load_rows(load, seconds)
        if page:
            yield compare(
                "http", "first byte of the page, p50", "ms",
                ours=page, peer="the goal", peer_values=[PAGE_GOAL_MS], higher_is_better=False,
            )  # fmt: skip


def _write(folder: Path, name: str, max_pending: int) -> Path:
    file = folder / f"{name}.toml"
    file.write_text(_TOPOLOGY.format(model=folder / "model", state=folder / name, max_pending=max_pending))
    return file


# -- accepted requests


async def _accepted(topology: Path, ray_port: int, rounds: int) -> dict[tuple[str, int], list[float]]:
    """Measure both sides in turn, with the instances of ours stopped."""
    body = json.dumps(_BODY).encode()
    headers = {"Content-Type": "application/json", "Prefer": "respond-async"}
    rates: dict[tuple[str, int], list[float]] = defaultdict(list)
    async with launch(topology, {"api": {"port": 0}}) as cluster, _stopped(cluster, _instances(cluster)):
        port = cluster.topology.api.port
        sides = {
            "triptych": (port, request_bytes("POST", f"127.0.0.1:{port}", "/v1/images/generations", headers, body)),
            "ray": (ray_port, request_bytes("POST", f"127.0.0.1:{ray_port}", "/", headers, body)),
        }
        order = list(sides)
        for number in range(rounds + 1):
            for in_flight in _IN_FLIGHT:
                for side in order:
                    where, request = sides[side]
                    connections = await connect(where, in_flight)
                    per_second = await rate(connections, request, 202, _ACCEPT_S if number else _WARM_UP_S)
                    if number:  # the first round warms up
                        rates[side, in_flight].append(per_second)
                    for connection in connections:
                        connection.close()
            order.append(order.pop(0))
    return rates


def _instances(cluster: Cluster) -> list[str]:
    return [component.name for component in cluster.topology.components if component.slots]


@contextlib.asynccontextmanager
async def _stopped(cluster: Cluster, names: list[str]) -> AsyncIterator[None]:
    """Stop the processes of these components, and let them go on at the end."""
    pids = [await cluster.pid_of(name) for name in names]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def _ray_serve() -> Iterator[int]:
    """Run Ray Serve's echo and return its port; raises SystemExit where Ray is not installed."""
    python = Path(os.environ.get(RAY_VARIABLE, _ROOT / ".venv-ray/bin/python"))
    if not python.exists():
        raise SystemExit(f"there is no {python}: `make bench-http` installs Ray Serve there, or set {RAY_VARIABLE}")
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        port = free_port()
        command = [str(python), "-P", str(Path(__file__).with_name("serve_echo.py")), str(port), folder]
        process = subprocess.Popen(  # noqa: S603  our own command
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            if process.stdout is None or not any(line == "ready\n" for line in process.stdout):
                raise RuntimeError(f"Ray Serve did not start: see {folder}/session_latest/logs")
            yield port
        finally:
            try:
                process.communicate(timeout=_PATIENCE_S)  # the end of its standard input ends it
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


# -- event streams


@dataclass
class _Load:
    """What has happened under load."""

    outcomes: Counter[str] = field(default_factory=Counter)
    """Requests: done, refused (429), and each error in words."""
    seconds: list[float] = field(default_factory=list)
    """From the request to its image, of those that are done."""
    open_streams: list[int] = field(default_factory=list)
    """At each look."""
    memory: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """MiB that a process has resident, at each look."""


async def _streamed(topology: Path, seconds: float) -> tuple[list[float], _Load]:
    load = _Load()
    async with launch(topology, {"api": {"port": 0}}) as cluster:
        page = await _page(cluster)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(base_url=cluster.url, timeout=_PATIENCE_S, limits=limits) as http:
            held, denoiser = await _hold(http)
            async with _stopped(cluster, [denoiser]):
                await _run_load(cluster, http, held, seconds, load)
            (await http.delete(f"/v1/requests/{held}")).raise_for_status()
    return page, load


async def _hold(http: httpx.AsyncClient) -> tuple[str, str]:
    """Begin a request that is denoised for longer than the load lasts; return its id and the denoiser."""
    body = {**_BODY, "num_inference_steps": _MANY_STEPS}
    headers = {"Prefer": "respond-async"}
    held: str = (await http.post("/v1/images/generations", json=body, headers=headers)).raise_for_status().json()["id"]
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            (job,) = (await http.get(f"/v1/requests/{held}")).raise_for_status().json()["units"]
            if job["state"] == "DENOISING_RUNNING" and job["step"]:
                return held, job["instances"]["denoiser"]
            await asyncio.sleep(0.05)


async def _run_load(cluster: Cluster, http: httpx.AsyncClient, held: str, seconds: float, load: _Load) -> None:
    pids = {name: await cluster.pid_of(name) for name in _SERVERS}
    is_open: set[int] = set()
    followers = [asyncio.create_task(_follow(http, held, number, is_open, load)) for number in range(CLIENTS)]
    async with asyncio.timeout(_PATIENCE_S):
        while len(is_open) < CLIENTS and not load.outcomes:  # noqa: ASYNC110  a look now and then will do
            await asyncio.sleep(0.05)
    await _requests(http, _SETTLE_S, _Load())  # what grows once, such as caches, has grown after that
    looking = asyncio.create_task(_look(pids, is_open, seconds, load))
    await _requests(http, seconds, load)
    await looking
    for follower in followers:
        follower.cancel()
    await asyncio.gather(*followers, return_exceptions=True)


async def _follow(http: httpx.AsyncClient, request_id: str, number: int, is_open: set[int], load: _Load) -> None:
    """Hold an event stream open; that it ends is an error."""
    try:
        async with http.stream("GET", f"/v1/requests/{request_id}/events") as answer:
            if answer.status_code == httpx.codes.OK:
                is_open.add(number)
            async for _ in answer.aiter_bytes():
                pass
        load.outcomes[f"event stream ended: {answer.status_code}"] += 1
    except httpx.HTTPError as error:
        load.outcomes[f"event stream lost: {error!r}"] += 1
    finally:
        is_open.discard(number)


async def _requests(http: httpx.AsyncClient, seconds: float, load: _Load) -> None:
    """Request images at a constant rate, however long each takes, and wait for all of them."""
    start, tasks = time.perf_counter(), []
    for number in range(round(seconds * PER_SECOND)):
        await asyncio.sleep(start + number / PER_SECOND - time.perf_counter())
        tasks.append(asyncio.create_task(_image(http, number, load)))
    await asyncio.gather(*tasks)


async def _image(http: httpx.AsyncClient, seed: int, load: _Load) -> None:
    """Request an image as events, with a partial image."""
    began = time.perf_counter()
    body = {**_BODY, "seed": seed, "stream": True, "partial_images": 1}
    try:
        async with http.stream("POST", "/v1/images/generations", json=body) as answer:
            names = [line async for line in answer.aiter_lines() if line.startswith("event:")]
    except httpx.HTTPError as error:
        load.outcomes[repr(error)] += 1
        return
    if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
        load.outcomes["refused"] += 1
    elif answer.status_code == httpx.codes.OK and names[-1:] == ["event: image_generation.completed"]:
        load.outcomes["done"] += 1
        load.seconds.append(time.perf_counter() - began)
    else:
        load.outcomes[f"{answer.status_code}, last {names[-1:]}"] += 1


async def _look(pids: dict[str, int], is_open: set[int], seconds: float, load: _Load) -> None:
    """Note the open streams and the memory of the servers, every second."""
    until = time.monotonic() + seconds
    while True:
        load.open_streams.append(len(is_open))
        for name, pid in pids.items():
            load.memory[name].append(process_memory(pid).rss)
        if time.monotonic() >= until:
            return
        await asyncio.sleep(1.0)


def _load_rows(load: _Load, seconds: float) -> Iterator[dict[str, Any]]:
    """Make a row of the errors, one of the latency, and one of the memory of each server."""
    case = f"{CLIENTS} event streams, {PER_SECOND} requests/s for {seconds:g} s"
    errors = {what: count for what, count in load.outcomes.items() if what not in ("done", "refused")}
    yield {
        "bench": "http",
        "case": f"{case}: errors but 429",
        "unit": "errors",
        "ours": sum(errors.values()),
        "peer": "the goal",
        "peer_value": 0,
        "done": load.outcomes["done"],
        "refused": load.outcomes["refused"],
        "errors": errors,
        "least_open_streams": min(load.open_streams),
        "p50_ms": round(percentile(load.seconds, 50) * 1e3, 1) if load.seconds else None,
        "p99_ms": round(percentile(load.seconds, 99) * 1e3, 1) if load.seconds else None,
    }
    for name, mib in load.memory.items():
        start, middle, end = mib[0], mib[len(mib) // 2], mib[-1]
        row = compare(
            "http", f"{case}: memory of {name}, end against middle", "MiB",
            ours=[end], peer="middle", peer_values=[middle], higher_is_better=False,
        )  # fmt: skip
        yield {**row, "start": round(start, 1), "most": round(max(mib), 1)}


# -- the page


async def _page(cluster: Cluster) -> list[float]:
    """Return the milliseconds to the first byte of the page, of a new connection each; none where there is no page."""
    taken = []
    async with httpx.AsyncClient(base_url=cluster.url, timeout=_PATIENCE_S) as http:
        if (await http.get("/")).status_code != httpx.codes.OK:
            return []
    for _ in range(_PAGES):
        began = time.perf_counter()
        reader, writer = await asyncio.open_connection("127.0.0.1", cluster.topology.api.port)
        writer.write(request_bytes("GET", f"127.0.0.1:{cluster.topology.api.port}", "/", {}))
        await reader.readexactly(1)
        taken.append((time.perf_counter() - began) * 1e3)
        writer.close()
    return taken
