"""A whole system on several hosts, for the length of a block: what `api.launch` is for one."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec

from triptych.actors.errors import TopologyError
from triptych.actors.runtime.address_book import CHILDREN, supervisor_of
from triptych.actors.runtime.bus_keys import read_key, write_new_key
from triptych.actors.runtime.system_messages import ChildReport, SupervisorQuery, SupervisorReport
from triptych.actors.supervision import module_command
from triptych.actors.topology import Topology, load_topology, stop_bound_s, write_with_overrides
from triptych.actors.topology.paths import fingerprint
from triptych.api.client import ClientError, timeout
from triptych.api.launch import ClusterClient
from triptych.bus import Outbox
from triptych.tools.hosts.namespaces import DISK, HostProcess, Hosts
from triptych.tools.hosts.network import end_holder, wait_for

_FORWARD: Final = Path(__file__).with_name("forward.py")
_READY_EVERY_S: Final = 0.1
_QUERY_TIMEOUT_S: Final = 2.0
_STOP_MARGIN_S: Final = 5.0
_SOCKET: Final = "api.sock"
_KEY: Final = "bus.key"
_LOG: Final = "up.log"


class HostsCluster(ClusterClient):
    """A system on hosts; it is asked from outside of them, so that no fault between them is in the way.

    Attributes:
        hosts: where it runs. Faults of the network are theirs.
        topology: the paths in it are those of this machine.
        exit_codes: of the supervisor of each host, once it is closed.
    """

    def __init__(self, hosts: Hosts, topology: Topology, environments: Mapping[str, Mapping[str, str]]) -> None:
        self.hosts = hosts
        self._environments = environments
        self.exit_codes: dict[str, int] = {}
        self._up: dict[str, HostProcess] = {}
        self._forward: HostProcess | None = None
        super().__init__(topology)
        self._asking = Outbox("hosts")

    def http_client(self, timeout_s: float | httpx.Timeout | None = None) -> httpx.AsyncClient:
        """Make a client of the API on the head's host. Close it."""
        bounds = timeout() if timeout_s is None else timeout_s
        transport = httpx.AsyncHTTPTransport(uds=self._api_socket)
        return httpx.AsyncClient(base_url=self.url, timeout=bounds, transport=transport)

    @property
    def _api_socket(self) -> str:
        return str(self.hosts.disk(self.topology.head_host) / _SOCKET)

    def start(self, host: str) -> None:
        """Start the part of the system that runs on a host, which runs."""
        command = ("up", str(self.topology.path), "--host", host, "--until-eof")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("MC_", "TRIPTYCH_"))}
        with (self.hosts.disk(host) / _LOG).open("ab") as log:
            self._up[host] = self.hosts.popen(
                host,
                *module_command("triptych.actors.command"),
                *command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**environment, **self._environments.get(host, {})},
            )
        if host == self.topology.head_host:
            if self._forward:
                end_holder(self._forward)
            at = (f"{DISK}/{_SOCKET}", str(self.topology.api.port))
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self._forward = self.hosts.popen(host, sys.executable, "-I", "-S", str(_FORWARD), *at, **pipes)
            wait_for(self._forward, "up")

    def kill_host(self, host: str) -> None:
        """Switch a host off."""
        self.hosts.kill(host)
        del self._up[host]

    def restart_host(self, host: str) -> None:
        """Start a host that was switched off, and the part of the system on it."""
        self.hosts.start(host)
        self.start(host)

    def start_ended(self) -> None:
        """Start the parts again that have ended, as a service manager does."""
        for host, process in tuple(self._up.items()):
            if process.poll() is not None:
                self.start(host)

    def log(self, host: str) -> str:
        """Return what the processes of a host have written."""
        return (self.hosts.disk(host) / _LOG).read_text()

    async def children(self) -> dict[str, ChildReport]:
        """Return what the supervisors of all hosts know of each component, by name."""
        reports = await asyncio.gather(*(self.children_on(host) for host in self.hosts.names))
        return {child.name: child for report in reports for child in report}

    async def child(self, name: str) -> ChildReport:
        """Return what its supervisor knows of a component; raises `BusError` while that does not run."""
        host = self.topology.component(name).host
        return {child.name: child for child in await self.children_on(host)}[name]

    async def children_on(self, host: str) -> tuple[ChildReport, ...]:
        """Return what the supervisor of a host knows; raises `BusError` while it does not run."""
        name = supervisor_of(host)
        run_dir = f"run/triptych/{fingerprint(self.topology.path)}"
        # Through its file system: a supervisor is at an ipc address for its own host.
        address = f"ipc://{self.hosts.root(host)}/{run_dir}/{name}"
        reference = self._asking.reference(name + CHILDREN, address)
        return (await reference.ask(SupervisorQuery(), SupervisorReport, timeout_s=_QUERY_TIMEOUT_S)).children

    def process_id(self, child: ChildReport) -> int:
        """Return what this machine calls the process of a component; raises `ProcessLookupError` if it has ended."""
        pids = self.hosts.outer_pids(self.topology.component(child.name).host)
        if child.pid not in pids:
            raise ProcessLookupError(f"{child.name} has ended")
        return pids[child.pid]

    def process_ids(self) -> list[int]:
        """Return what this machine calls the processes of the system, on all hosts that run."""
        hosts = tuple(self._up)
        return [pid for host in hosts for inner, pid in self.hosts.outer_pids(host).items() if inner != 1]

    def connect_to_api(self) -> socket.socket:
        """Connect to the port of the API; raises OSError."""
        raw = socket.socket(socket.AF_UNIX)
        try:
            raw.settimeout(_QUERY_TIMEOUT_S)
            raw.connect(self._api_socket)
        except OSError:
            raw.close()
            raise
        return raw

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until the system is ready; raises `ClientError` when a part of it ends, or it takes longer."""
        try:
            async with asyncio.timeout(timeout_s):
                while not await self.ready():
                    for host, process in self._up.items():
                        if process.poll() is not None:
                            raise ClientError(f"host {host} ended with {process.returncode}: {self.log(host)[-2000:]}")
                    await asyncio.sleep(_READY_EVERY_S)
        except TimeoutError:
            raise ClientError(f"not ready within {timeout_s:g} s: {await self._not_ready()}") from None

    async def close(self) -> None:
        """Stop everything in order; `exit_codes` says how each part ended."""
        self._asking.close()
        await self._http.aclose()
        for process in self._up.values():
            process.terminate()
        patience = stop_bound_s(self.topology) + _STOP_MARGIN_S
        for process in self._up.values():
            try:
                await asyncio.to_thread(process.wait, patience)
            except subprocess.TimeoutExpired:
                process.kill()
        self.exit_codes = {host: process.wait() for host, process in self._up.items()}
        if self._forward:
            end_holder(self._forward)

    async def _not_ready(self) -> str:
        with suppress(httpx.HTTPError):
            return (await self._http.get("/ready")).text
        return "the API does not answer"


@asynccontextmanager
async def launch_on_hosts(
    path: Path | str,
    overrides: Mapping[str, Mapping[str, object]] | None = None,
    *,
    shared: Iterable[Path] = (),
    environments: Mapping[str, Mapping[str, str]] | None = None,
    disks: Path | None = None,
    ready_timeout_s: float = 300.0,
) -> AsyncIterator[HostsCluster]:
    """Run a topology with `[[hosts]]` on hosts made for it, and yield it once it is ready.

    Each host has a key of its own, and its state on its own disk. The addresses in the file are replaced by those of
    the hosts.

    Args:
        path: the topology file.
        overrides: keys of the file that are changed, as for `api.launch.launch`.
        shared: folders that every host sees, besides those of the models.
        environments: further variables for the processes of a host, by its name.
        disks: folder of this machine for the disks of the hosts; by default one that goes with them.
        ready_timeout_s: seconds until it must be ready.

    Raises:
        TopologyError: the file, with the overrides, cannot be run.
        HostsError: hosts cannot be made on this machine.
        ClientError: it was not ready in time.
    """
    written = load_topology(Path(path))
    file = written.path
    if not written.hosts:
        raise TopologyError(str(file), "", "has no [[hosts]]", "add one for each machine")
    names = [host.name for host in written.hosts]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="triptych-")))
        folders = [folder, *shared, *(files for model in written.models for files in model.files)]
        models = (overrides or {}).get("model", {})
        folders += [Path(str(models["path"]))] if "path" in models else []
        hosts = stack.enter_context(Hosts(names, shared=folders, disks=disks))
        rows: dict[str, object] = {}
        for name in names:
            key = hosts.disk(name) / _KEY
            write_new_key(key)
            rows[name] = {"address": hosts.address(name), "public_key": read_key(key).public.decode()}
        own: dict[str, Any] = {"hosts": rows, "bus": {"keys": f"{DISK}/{_KEY}"}, "state": {"path": f"{DISK}/state"}}
        changed = {section: {**own.get(section, {}), **keys} for section, keys in (overrides or {}).items()}
        topology = load_topology(write_with_overrides(file, {**own, **changed}, folder))
        disk = hosts.disk(topology.head_host)
        bus = msgspec.structs.replace(topology.bus, keys=str(disk / _KEY))
        seen = msgspec.structs.replace(topology, state_dir=disk / "state", bus=bus)
        cluster = HostsCluster(hosts, seen, environments or {})
        try:
            for name in names:
                cluster.start(name)
            await cluster.wait_ready(ready_timeout_s)
            yield cluster
        finally:
            await cluster.close()
