"""Run a whole cluster from Python: `async with triptych.launch("examples/demo.toml") as cluster: ...`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, overload

import httpx

from triptych.actors.child_state import FINAL_STATES, ChildState
from triptych.actors.errors import TopologyError
from triptych.actors.runtime.address_book import SUPERVISOR, AddressBook
from triptych.actors.runtime.system_messages import ChildReport, SupervisorQuery, SupervisorReport
from triptych.actors.supervision import module_command
from triptych.actors.topology import Topology, load_topology, stop_bound_s, write_with_overrides
from triptych.api.client import (
    GENERATE_TIMEOUT_S,
    KEY_VARIABLE,
    ClientError,
    GeneratedImage,
    authorization,
    read_images,
    read_json,
    request_body,
    timeout,
    unreachable,
)
from triptych.api.keys import ApiKeysError, load_api_keys
from triptych.bus import BusError, Outbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping

_READY_EVERY_S: Final = 0.1
_LOOKS_PER_REPORT: Final = 20
_QUERY_TIMEOUT_S: Final = 5.0
_STOP_MARGIN_S: Final = 5.0


class ClusterClient:
    """A client of a running cluster; every method may be called concurrently."""

    def __init__(self, topology: Topology, api_key: str = "") -> None:
        self.topology = topology
        self.url = topology.url
        """Base URL of the API, such as http://127.0.0.1:8000."""
        self._api_key = api_key
        self._http = self.http_client()

    def http_client(self, timeout_s: float | httpx.Timeout | None = None) -> httpx.AsyncClient:
        """Make a client of the API that sends the key; its `timeout_s` seconds are a few by default. Close it."""
        bounds = timeout() if timeout_s is None else timeout_s
        return httpx.AsyncClient(base_url=self.url, timeout=bounds, headers=authorization(self._api_key))

    @overload
    async def generate(
        self,
        prompt: str | None = None,
        *,
        model: str | None = None,
        size: str | None = None,
        steps: int | None = None,
        seed: int | None = None,
        n: None = None,
        priority: int | None = None,
        deadline_s: float | None = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **inputs: object,
    ) -> GeneratedImage: ...

    @overload
    async def generate(
        self,
        prompt: str | None = None,
        *,
        model: str | None = None,
        size: str | None = None,
        steps: int | None = None,
        seed: int | Sequence[int] | None = None,
        n: int,
        priority: int | None = None,
        deadline_s: float | None = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **inputs: object,
    ) -> list[GeneratedImage]: ...

    @overload
    async def generate(
        self,
        prompt: str | None = None,
        *,
        model: str | None = None,
        size: str | None = None,
        steps: int | None = None,
        seed: Sequence[int],
        n: int | None = None,
        priority: int | None = None,
        deadline_s: float | None = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **inputs: object,
    ) -> list[GeneratedImage]: ...

    async def generate(
        self,
        prompt: str | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        n: int | None = None,
        timeout_s: float = GENERATE_TIMEOUT_S,
        **inputs: Any,
    ) -> GeneratedImage | list[GeneratedImage]:
        """Make one image, or a list: of `n` images, or of one for each seed.

        Args:
            prompt: Left out where the model takes none.
            model: Its name, by default the first.
            size: "WIDTHxHEIGHT" in pixels.
            steps: Number of denoising steps.
            seed: Of the first image, the next has the next; or one for each image.
            n: How many images.
            priority: A higher one goes before other requests; by default 0.
            deadline_s: Seconds in which the result is wanted, for `[head] policy = "deadline"`; nothing is cancelled.
            timeout_s: Seconds to wait.
            inputs: Any other input of the model; those that are left out, or None, take the model's default. An image
                is a `Path`, or the `bytes` of a PNG, JPEG or WebP file, or a list of those.

        Raises:
            ClientError: with the server's message.
        """
        size, steps = inputs.pop("size", None), inputs.pop("steps", None)
        if n is None and isinstance(seed, Sequence):
            n = len(seed)
        body = await asyncio.to_thread(request_body, prompt, size=size, steps=steps, seed=seed, extra=inputs, n=n)
        try:
            answer = await self._http.post("/v1/images/generations", json=body, timeout=timeout(timeout_s))
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from error
        images = read_images(answer, n or 1)
        return images[0] if n is None else images

    async def status(self) -> dict[str, Any]:
        """Return what `GET /v1/cluster` answers; raises `ClientError`."""
        return await self._get("/v1/cluster")

    async def request(self, request_id: str) -> dict[str, Any]:
        """Return what `GET /v1/requests/{id}` answers: state, history, stage times; raises `ClientError`."""
        return await self._get(f"/v1/requests/{request_id}")

    async def _get(self, path: str) -> dict[str, Any]:
        try:
            return read_json(await self._http.get(path))
        except httpx.HTTPError as error:
            raise unreachable(self.url, error) from error

    async def ready(self) -> bool:
        """Whether `GET /ready` says that the cluster takes requests."""
        try:
            return (await self._http.get("/ready")).is_success
        except httpx.HTTPError:
            return False  # not listening yet is not ready either


class Cluster(ClusterClient):
    """A cluster that runs as long as its `launch` block."""

    def __init__(
        self,
        topology: Topology,
        process: asyncio.subprocess.Process,
        api_key: str = "",
        *,
        reason_file: Path | None = None,
    ) -> None:
        super().__init__(topology, api_key)
        self._reason_file = reason_file
        self.process = process
        """The `triptych up` process."""
        self._outbox = Outbox("launch")

    async def children(self) -> dict[str, ChildReport]:
        """Return what the supervisor knows of each component, by name; works while the API is down, too."""
        supervisor = self._outbox.reference(SUPERVISOR, AddressBook(self.topology).address(SUPERVISOR))
        report = await supervisor.ask(SupervisorQuery(), SupervisorReport, timeout_s=_QUERY_TIMEOUT_S)
        return {child.name: child for child in report.children}

    async def pid_of(self, name: str) -> int:
        """Return the process id of a component, 0 while it has no process; raises `KeyError` for an unknown name."""
        return (await self.children())[name].pid

    async def wait_ready(self, timeout_s: float) -> None:
        """Wait until the cluster is ready; raises `ClientError` when it ends, cannot become ready or takes longer."""
        ended = asyncio.create_task(self.process.wait())
        looks = 0
        try:
            async with asyncio.timeout(timeout_s):
                while not await self.ready():
                    await asyncio.wait({ended}, timeout=_READY_EVERY_S)
                    if ended.done():
                        raise ClientError(self._exit_reason(ended.result()))
                    looks += 1
                    if looks % _LOOKS_PER_REPORT == 0:
                        await self._check_can_become_ready()
        except TimeoutError:
            raise ClientError(
                f"the cluster was not ready within {timeout_s:g} s: {await self._not_ready_reason()}"
            ) from None
        finally:
            ended.cancel()

    async def close(self) -> None:
        """Stop everything in order, as Ctrl-C does, and wait for it."""
        self._outbox.close()
        await self._http.aclose()
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself in this moment
                self.process.terminate()
        patience = stop_bound_s(self.topology) + _STOP_MARGIN_S
        try:
            await asyncio.wait_for(self.process.wait(), patience)
        except TimeoutError:
            self.process.kill()  # its children follow: they die with their parent
            await self.process.wait()

    async def _check_can_become_ready(self) -> None:
        try:
            children = (await self.children()).values()
        except BusError:
            return  # the supervisor itself is still starting
        if cannot_become_ready([child.state for child in children]) and not await self.ready():
            raise ClientError(f"the cluster cannot become ready: {describe_children(children)}")

    def _exit_reason(self, code: int) -> str:
        reason = self._reason_file.read_text() if self._reason_file and self._reason_file.exists() else ""
        return f"the cluster ended with exit code {code} before it was ready{reason and ': '}{reason}"

    async def _not_ready_reason(self) -> str:
        try:
            return describe_children((await self.children()).values())
        except BusError as error:
            return f"the supervisor does not answer ({error})"


def cannot_become_ready(states: Sequence[ChildState]) -> bool:
    """Whether waiting is in vain: some children will not run any more, and no other is starting. Pure."""
    stuck = FINAL_STATES | {ChildState.DELAYED}  # a taken port may come free later, but who waits now is told now
    settled = stuck | {ChildState.READY, ChildState.ASLEEP}
    return any(state in stuck for state in states) and all(state in settled for state in states)


def describe_children(children: Iterable[ChildReport]) -> str:
    """List every child with its state and the reason for it. Pure."""
    return ", ".join(f"{c.name} is {c.state}{f' ({c.reason})' if c.reason else ''}" for c in children)


def _first_key(topology: Topology) -> str:
    if topology.keys_path is None:
        return ""
    try:
        return next(iter(load_api_keys(topology.keys_path).keys))
    except ApiKeysError as error:
        raise TopologyError(str(topology.path), "[api] keys_file", error.problem, error.fix) from error


@contextlib.asynccontextmanager
async def launch(
    path: Path | str,
    overrides: Mapping[str, Mapping[str, object]] | None = None,
    *,
    ready_timeout_s: float = 300.0,
    api_key: str = "",
    verbose: bool = False,
) -> AsyncIterator[Cluster]:
    """Run a topology for the length of an `async with` block, and yield it once it is ready.

    `overrides` changes keys of the file, `{"api": {"port": 9000}, "roles": {"denoiser": {"count": 2}}}`: roles are
    named by their name or kind; `{"api": {"port": 0}}` takes a free port. The cluster is a `triptych up`
    process of its own, which ends with this one however this one ends. `api_key` is what its methods send, where the
    topology has `[api] keys_file`: by default the environment's TRIPTYCH_API_KEY, else the first key of that file.
    Nothing is printed, unless `verbose` lets the cluster's lines and logs through.

    Raises:
        TopologyError: the file, with the overrides, cannot be run.
        ClientError: the cluster was not ready within `ready_timeout_s` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="triptych-") as folder:
        file = Path(path)
        if overrides:
            file = write_with_overrides(file, overrides, Path(folder))
        topology = load_topology(file)
        if len(topology.hosts) > 1:
            fix = "start each with `triptych up FILE --host NAME`, and send requests to its API"
            raise TopologyError(str(path), "", f"has {len(topology.hosts)} hosts, and this starts one machine", fix)
        key = api_key or os.environ.get(KEY_VARIABLE, "") or _first_key(topology)
        reason_file = Path(folder) / "reason"
        options = ("--parent", str(os.getpid()), "--reason-file", str(reason_file))
        command = (*module_command("triptych.actors.command"), "up", str(file), *options)
        output = None if verbose else asyncio.subprocess.DEVNULL
        process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output)
        cluster = Cluster(topology, process, key, reason_file=reason_file)
        try:
            await cluster.wait_ready(ready_timeout_s)
            yield cluster
        finally:
            await cluster.close()
