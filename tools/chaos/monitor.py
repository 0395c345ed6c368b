"""Observe a cluster from outside, during the faults and once it is idle."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import sqlite3
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from triptych.actors import AddressBook
from triptych.actors.child_state import ChildState
from triptych.api.client import ClientError
from triptych.api.cluster import PROBE_AGE_S
from triptych.api.launch import Cluster, launch
from triptych.bus import Outbox
from triptych.engines.backends import BACKENDS
from triptych.roles.head.job import TERMINAL_STATES, State
from triptych.roles.messages.pool import LeaseQuery, LeaseReport, LeaseView
from triptych.tools.chaos.load import request_body
from triptych.tools.chaos.plan import CHANGED, ImageCase
from triptych.tools.chaos.target import Target
from triptych.tools.procfs import stat

SAMPLE_INTERVAL_S = 0.5
IDLE_TIMEOUT_S = 20.0
RESTART_TIMEOUT_S = 60.0
TOPOLOGY_CHANGE_TIMEOUT_S = 60.0
CHANGED_POOL = "1MiB"


class MailboxMonitor:
    """Samples every mailbox while the cluster runs."""

    def __init__(self, cluster: Target) -> None:
        self._cluster = cluster
        self.depths: dict[str, tuple[int, int]] = {}
        """Actor to the greatest depth of its mailbox, and its capacity."""

    async def run(self) -> None:
        """Sample until it is cancelled."""
        while True:
            try:
                actors = (await self._cluster.status())["actors"]
            except ClientError:  # the API may be the victim
                actors = []
            for actor in actors:
                deepest = max(self.depths.get(actor["name"], (0, 0))[0], actor.get("mailbox_depth", 0))
                self.depths[actor["name"]] = (deepest, actor.get("mailbox_capacity", 0) or deepest)
            await asyncio.sleep(SAMPLE_INTERVAL_S)

    def zombies(self) -> list[int]:
        """List the processes of the cluster that have ended and were not reaped."""
        return [pid for pid in self._cluster.process_ids() if stat(pid)[0] == "Z"]


async def wait_until_idle(cluster: Target) -> tuple[list[dict[str, Any]], list[LeaseView], int]:
    """Return the pools, their leases, and the number of leases of the prompt cache.

    Seen once it has all that are held for a request, or as they are after IDLE_TIMEOUT_S seconds.
    """
    names = [c.name for c in cluster.topology.components if c.kind == "pool"]
    address_book = AddressBook(cluster.topology)
    outbox = Outbox("chaos", options=address_book.socket_options)
    began = time.monotonic()
    try:
        while True:
            leases: list[LeaseView] = []
            for name in names:
                reference = outbox.reference(name, address_book.address(name))
                query: LeaseQuery | None = LeaseQuery()
                while query:
                    report = await reference.ask(query, LeaseReport, timeout_s=5.0)
                    leases += report.leases
                    query = LeaseQuery(report.leases[-1].lease.lease_id) if report.more else None
            seen = await cluster.status()
            kept = int(seen["head"]["prompt_cache"]["entries"]) if seen["head"] else 0
            if sum(bool(view.attempt.job_id) for view in leases) == kept or time.monotonic() - began > IDLE_TIMEOUT_S:
                return seen["pools"], leases, kept
            await asyncio.sleep(SAMPLE_INTERVAL_S)
    finally:
        outbox.close()


def journal_keys(cluster: Target) -> dict[str, str]:
    """Return the idempotency key of every request in the journal, by request id."""
    path = cluster.topology.state_dir / "journal.sqlite"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as journal:
        return dict(journal.execute("SELECT id, COALESCE(idempotency_key, '') FROM requests"))


async def check_restart_intensity(topology: Path, overrides: Mapping[str, Mapping[str, object]]) -> list[str]:
    """Kill one role more often than its intensity allows; `/ready` must name it."""
    strict = {**overrides, "supervision": {"intensity": 1, "period_s": 600}}
    async with launch(topology, strict) as cluster:
        victim = next(c.name for c in cluster.topology.components if c.kind in ("denoiser", "monolithic"))
        began = time.monotonic()
        while time.monotonic() - began < RESTART_TIMEOUT_S:
            child = (await cluster.children())[victim]
            if child.state == ChildState.GAVE_UP:
                return await _ready_names(cluster, victim)
            if child.state == ChildState.READY and child.pid:
                os.kill(child.pid, signal.SIGKILL)
                await _wait_for_exit(child.pid)
            await asyncio.sleep(SAMPLE_INTERVAL_S / 10)
    return [f"{victim} was not given up within {RESTART_TIMEOUT_S:g} s"]


async def check_changed_topology(
    topology: Path, overrides: Mapping[str, Mapping[str, object]], baseline: Mapping[ImageCase, str]
) -> list[str]:
    """Stop a cluster with active requests and start it with another engine and role names; all must be done."""
    async with (
        launch(topology, overrides) as cluster,
        cluster.http_client(TOPOLOGY_CHANGE_TIMEOUT_S) as http,
    ):
        answers = [
            await http.post("/v1/images/generations", json=request_body(image), headers={"Prefer": "respond-async"})
            for image in CHANGED
        ]
    ids = [answer.raise_for_status().json()["id"] for answer in answers]
    shared = cluster.topology.backend.shared_memory
    engine = next(name for name, spec in BACKENDS.items() if spec.shared_memory is not shared)
    kind = next(c.kind for c in cluster.topology.components if c.kind in ("denoiser", "monolithic"))
    transfer = {**overrides.get("transfer", {}), "engine": engine, "trusted_network": True, "pool_size": CHANGED_POOL}
    changed: dict[str, Mapping[str, object]] = {**overrides, "transfer": transfer, "roles": {kind: {"name": "renamed"}}}
    async with (
        launch(topology, changed) as cluster,
        cluster.http_client(TOPOLOGY_CHANGE_TIMEOUT_S) as http,
    ):
        return [
            sentence
            for image, name in zip(CHANGED, ids, strict=True)
            if (sentence := await _not_made(http, name, baseline[image]))
        ]


async def _not_made(http: httpx.AsyncClient, request_id: str, digest: str) -> str:
    """Say what is wrong with the end of a request; "" if it has the expected image."""
    began = time.monotonic()
    while time.monotonic() - began < TOPOLOGY_CHANGE_TIMEOUT_S:
        view = (await http.get(f"/v1/requests/{request_id}")).raise_for_status().json()
        if view["state"] == State.DONE:
            made = await http.get(view["units"][0]["artifact"]["url"])
            return "" if hashlib.sha256(made.content).hexdigest() == digest else f"{request_id} has other bytes"
        if view["state"] in TERMINAL_STATES:
            return f"{request_id} ended {view['state']}: {view['units'][0]['causes'][-1:]}"
        await asyncio.sleep(SAMPLE_INTERVAL_S)
    return f"{request_id} was not done within {TOPOLOGY_CHANGE_TIMEOUT_S:g} s"


async def _ready_names(cluster: Cluster, victim: str) -> list[str]:
    await asyncio.sleep(PROBE_AGE_S)  # from then on no answer is from before
    async with cluster.http_client() as http:
        answer = await http.get("/ready")
    if answer.status_code == 503 and victim in answer.text:
        return []
    return [f"/ready says {answer.status_code} {answer.text} after {victim} was given up"]


async def _wait_for_exit(pid: int) -> None:
    while os.path.exists(f"/proc/{pid}"):  # noqa: PTH110, ASYNC110, ASYNC240  another's process sends us no event
        await asyncio.sleep(SAMPLE_INTERVAL_S / 50)
