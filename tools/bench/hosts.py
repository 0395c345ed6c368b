"""Measure what runs on three hosts that are namespaces of this machine: pulls between pools, and the loss of a host.

The program reaches the hosts from their switch, so that no fault is between it and what it measures.
"""

from __future__ import annotations

import asyncio
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final

from triptych.actors import AddressBook
from triptych.bus import HEARTBEATS_LOST, BusError, Outbox, Reference
from triptych.roles.messages.requests import ClusterQuery, ClusterView
from triptych.tools.bench.clusters import allow_steps, make_model, stdout_to_stderr
from triptych.tools.bench.report import compare
from triptych.tools.bench.transfer import Place, compare_pulls
from triptych.tools.hosts import HostProcess, Hosts, enter_switch
from triptych.tools.hosts.cluster import HostsCluster, launch_on_hosts

ROUNDS: Final = 3
STEPS: Final = 1000
"""Of an image that is being denoised when its host is lost."""
LONG_S: Final = 20.0
"""Length of a long cut; the kernel's own timeouts have grown beyond it by then."""
REDISPATCH_GOAL_MS: Final = 250.0
"""From the break of the connection until the work runs elsewhere."""
SILENCE_MARGIN_MS: Final = 500.0
HEAL_GOAL_MS: Final = 1000.0
_POLL_S: Final = 0.005
_PATIENCE_S: Final = 240.0
_TOPOLOGY: Final = """
[model]
path = "{model}"
dtype = "float32"
[head]
host = "a"
[transfer]
trusted_network = true
pool_size = "16MiB"
[supervision]
intensity = 1000
{hosts}
[[roles]]
kind = "encoder"
host = "a"
[[roles]]
kind = "denoiser"
hosts = ["b", "c"]
checkpoint_s = 0.5
[[roles]]
kind = "decoder"
host = "a"
"""
_NAMES: Final = ("a", "b", "c")

Values = defaultdict[str, list[float]]


def run(rounds: int) -> Iterator[dict[str, object]]:
    """Measure all cases, `rounds` times each, and yield a row for each; times in ms, ratio = peer / ours."""
    enter_switch()
    with Hosts(_NAMES[:2]) as hosts:
        yield from compare_pulls("hosts", rounds, _place(hosts, "a"), _place(hosts, "b"))
    with tempfile.TemporaryDirectory(prefix="hosts-") as folder, stdout_to_stderr():
        values = asyncio.run(_losses(Path(folder), rounds))
    heartbeats = f"heartbeats that are missed, and {SILENCE_MARGIN_MS:g} ms"
    yield _row("processes of a host killed: work runs elsewhere", values, "the goal", REDISPATCH_GOAL_MS)
    yield _row("a host is silent: work runs elsewhere", values, heartbeats, values["silence"][0] + SILENCE_MARGIN_MS)
    yield _row(f"a cut of {LONG_S:g} s is healed: the instance is back", values, "the goal", HEAL_GOAL_MS)


def _row(case: str, values: Values, peer: str, goal_ms: float) -> dict[str, object]:
    row = compare("hosts", case, "ms", ours=values[case], peer=peer, peer_values=[goal_ms], higher_is_better=False)
    return row | {"most": round(max(values[case]), 1), "median": round(median(values[case]), 1)}


def _place(hosts: Hosts, host: str) -> Place:
    def popen(command: list[str], **options: Any) -> HostProcess:
        return hosts.popen(host, *command, **options)

    return Place(hosts.address(host), popen)


async def _losses(folder: Path, rounds: int) -> Values:
    await asyncio.to_thread(make_model, folder / "model", "--family", "flux")
    allow_steps(folder / "model", STEPS)
    addresses = enumerate(_NAMES, start=2)
    hosts = "\n".join(f'[[hosts]]\nname = "{name}"\naddress = "127.0.0.{n}"' for n, name in addresses)
    topology = folder / "topology.toml"
    topology.write_text(_TOPOLOGY.format(model=folder / "model", hosts=hosts))
    values: Values = defaultdict(list)
    async with launch_on_hosts(topology) as cluster:
        address_book = AddressBook(cluster.topology)
        outbox = Outbox("bench", options=address_book.socket_options)
        head = outbox.reference("head", address_book.address("head"))
        values["silence"] = [cluster.topology.bus_heartbeat_s * HEARTBEATS_LOST * 1e3]
        try:
            for _ in range(rounds):
                await _killed(cluster, head, values)
                await _silent(cluster, head, values)
        finally:
            outbox.close()
    return values


async def _killed(cluster: HostsCluster, head: Reference, values: Values) -> None:
    """Kill all processes of a host that denoises, and start them again."""
    began: list[float] = []

    def kill(host: str) -> None:
        began.append(time.time())
        cluster.hosts.signal(host, signal.SIGKILL)

    host, taken_s = await _until_elsewhere(cluster, head, kill)
    values["processes of a host killed: work runs elsewhere"].append((taken_s - began[0]) * 1e3)
    cluster.start(host)


async def _silent(cluster: HostsCluster, head: Reference, values: Values) -> None:
    """Cut a host that denoises off from all others, for a long time."""
    began: list[float] = []

    def cut(host: str) -> None:
        began.append(time.time())
        cluster.hosts.isolate(host)

    host, taken_s = await _until_elsewhere(cluster, head, cut)
    values["a host is silent: work runs elsewhere"].append((taken_s - began[0]) * 1e3)
    await asyncio.sleep(max(0.0, began[0] + LONG_S - time.time()))
    lost = {component.name for component in cluster.topology.on_host(host) if component.slots}
    cluster.hosts.heal()
    healed = time.monotonic()
    await _until(head, lambda view: lost <= {instance.name for instance in view.instances})
    case = f"a cut of {LONG_S:g} s is healed: the instance is back"
    values[case].append((time.monotonic() - healed) * 1e3)


async def _until_elsewhere(cluster: HostsCluster, head: Reference, lose: Callable[[str], None]) -> tuple[str, float]:
    """Lose the host that denoises an image; return it, and when (Unix seconds) another went on."""
    instances = {c.name for c in cluster.topology.components if c.slots}
    await _until(head, lambda view: instances == {instance.name for instance in view.instances})
    async with cluster.http_client(_PATIENCE_S) as http:
        body = {"prompt": "a circle", "seed": 1, "num_inference_steps": STEPS, "size": "64x64"}
        answer = await http.post("/v1/images/generations", json=body, headers={"Prefer": "respond-async"})
        request_id = answer.raise_for_status().json()["id"]
        denoisers = {c.name: c.host for c in cluster.topology.components if c.kind == "denoiser"}
        busy: list[str] = []

        def denoising(view: ClusterView) -> bool:
            busy[:] = [each.name for each in view.instances if each.name in denoisers and each.running]
            return bool(busy) and view.states.get("DENOISING_RUNNING", 0) > 0

        await _until(head, denoising)
        lose(denoisers[busy[0]])
        while True:
            (job,) = (await cluster.request(request_id))["units"]
            running = [move["at"] for move in job["history"] if move["state"] == "DENOISING_RUNNING"]
            if len(running) > 1:
                break
            await asyncio.sleep(_POLL_S)
        (await http.delete(f"/v1/requests/{request_id}")).raise_for_status()
    return denoisers[busy[0]], running[1]


async def _until(head: Reference, condition: Callable[[ClusterView], bool]) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            try:
                if condition(await head.ask(ClusterQuery(), ClusterView, timeout_s=1.0)):
                    return
            except BusError:  # it is busy with the loss
                continue
            await asyncio.sleep(_POLL_S)
