"""What faults are injected into: a cluster on this host, or one on several."""

from __future__ import annotations

import socket
from typing import Any, Protocol

import httpx

from triptych.actors import Topology
from triptych.actors.runtime.system_messages import ChildReport
from triptych.api.client import GeneratedImage
from triptych.api.launch import Cluster
from triptych.tools.procfs import children_of


class Target(Protocol):
    """A running cluster, as `api.launch.Cluster` and `tools.hosts.cluster.HostsCluster` are one."""

    topology: Topology
    url: str

    def http_client(self, timeout_s: float | httpx.Timeout | None = None) -> httpx.AsyncClient:
        """Make a client of the API."""

    async def generate(self, prompt: str, *, size: str, steps: int, seed: int) -> GeneratedImage:
        """Make an image."""

    async def status(self) -> dict[str, Any]:
        """Return what `GET /v1/cluster` answers."""

    async def children(self) -> dict[str, ChildReport]:
        """Return what supervisors know of each component."""

    async def child(self, name: str) -> ChildReport:
        """Return what its supervisor knows of a component."""

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until it takes requests."""

    def process_id(self, child: ChildReport) -> int:
        """Return what this machine calls the process of a component."""

    def process_ids(self) -> list[int]:
        """Return what this machine calls the processes of the cluster."""

    def connect_to_api(self) -> socket.socket:
        """Connect to the port of the API; raises OSError."""


class LocalTarget:
    """A cluster on this host."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.topology, self.url = cluster.topology, cluster.url
        self.http_client, self.generate, self.status = cluster.http_client, cluster.generate, cluster.status
        self.children, self.wait_ready = cluster.children, cluster.wait_ready

    async def child(self, name: str) -> ChildReport:
        """Return what the supervisor knows of a component."""
        return (await self.children())[name]

    def process_id(self, child: ChildReport) -> int:
        """Return the process of a component."""
        return child.pid

    def process_ids(self) -> list[int]:
        """Return the processes of the cluster."""
        supervisor = self._cluster.process.pid
        return [supervisor, *children_of(supervisor)]

    def connect_to_api(self) -> socket.socket:
        """Connect to the port of the API."""
        api = self.topology.api
        return socket.create_connection((api.host, api.port), timeout=5)
