"""Whole clusters of real processes, on tiny models made from configs.

A test that leaves a cluster as it found it shares one with the others of its topology: it is marked
`@pytest.mark.shared_cluster("flux")`, with a name of `SHARED`, and uses the fixture `on_cluster`. A test that needs a
topology of its own, or ends the cluster, launches one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_ports
from triptych.api.launch import Cluster, launch
from triptych.bus import BusError
from triptych.engines.parameters.serving_config import SERVING_CONFIG_NAME
from triptych.tools.hosts.cluster import HostsCluster, launch_on_hosts

ROOT = Path(__file__).parents[2]
STAGES = ("encoder", "denoiser", "decoder")
FREE_PORTS = {"api": {"port": 0}}
BOUND_S = 60.0
"""Longest wait for what must come: importing libraries anew takes seconds, and more on a busy machine."""
WEBHOOK_SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MANY_STEPS = 100_000
"""Steps that nobody waits for."""


@dataclass(frozen=True)
class SharedModel:
    """One of several models that a shared cluster serves; a copy of a tiny model where it is not as that one."""

    family: str
    task: str = ""
    denoisers: int = 1
    slots: int = 1
    max_batch: int = 1
    """Of its denoiser."""
    loras: Mapping[str, float] = field(default_factory=dict)
    """The scale of each adapter; its file is `NAME.safetensors` beside the topology."""
    copied: bool = False


MODELS = {
    "wan": SharedModel("wan"),
    "pixart": SharedModel("pixart"),
    "image-to-image": SharedModel("flux-kl", task="image-to-image"),
    "inpainting": SharedModel("sdxl", task="inpainting"),
    "image-to-video": SharedModel("wan-i2v", task="image-to-video"),
    "sound": SharedModel("ltx2"),
    "adapters": SharedModel("flux", slots=4, loras={"ink": 0.6, "clay.v2": 1.0}),
    "batched": SharedModel("flux", slots=4, max_batch=4),
    # Its files are changed by a test.
    "changed": SharedModel("flux", denoisers=2, copied=True),
}
"""The models of the shared cluster "models"."""

SHARED: dict[str, dict[str, Any]] = {
    "flux": {"roles": {"encoder": 2, "denoiser": 1, "decoder": 1}, "state": {"timeline": True}},
    "models": {},
    # As on several hosts: nothing is shared, and the bus has its keys.
    "mooncake": {"transfer": {"engine": "mooncake", "trusted_network": True}, "bus": {"transport": "tcp"}},
    # Tests that kill or stop processes of it, and wait until they are back.
    "killed": {
        "family": "flux-any-steps",
        "roles": {"encoder": 1, "denoiser": 2, "decoder": 1},
        "supervision": {"intensity": 100, "heartbeat_timeout_s": 5},
        "role_keys": {"denoiser": {"checkpoint_s": 0.1, "slots": 1}},
        "webhooks": {"hosts": ["127.0.0.1"], "keys_file": "webhook.keys", "retry_s": 0.1},
    },
    # On three hosts that are namespaces of this machine; b and c each can do without the other.
    "hosts": {
        "family": "flux-any-steps",
        "roles": {"encoder": 1, "denoiser": 1, "decoder": 1},
        "hosts": {"encoder": ["a"], "denoiser": ["b", "c"], "decoder": ["a", "c"]},
        "head": {"host": "a"},
        "transfer": {"trusted_network": True},
        "supervision": {"intensity": 100, "heartbeat_timeout_s": 5},
        "role_keys": {"denoiser": {"checkpoint_s": 0.1, "slots": 2}},
    },
}
"""The topologies of shared clusters."""

Scenario = Callable[[Any], Coroutine[Any, Any, Any]]


class SharedClusters:
    """The cluster that tests share at present: one at a time, started when first asked for."""

    def __init__(self, models: Callable[[str], Path], folder: Path) -> None:
        self._models = models
        self._folder = folder
        self._runner = asyncio.Runner()
        self._stack = AsyncExitStack()
        self._name = ""
        self._cluster: Cluster | HostsCluster | None = None

    def run(self, name: str, scenario: Scenario) -> Any:
        """Return what the scenario makes of the cluster of that name; it is ready when the scenario begins."""
        return self._runner.run(self._run(name, scenario))

    def close(self) -> None:
        self._runner.run(self._stop())
        self._runner.close()

    async def _run(self, name: str, scenario: Scenario) -> Any:
        if self._cluster is None or self._name != name or not await all_ready(self._cluster):
            await self._stop()
            self._name, self._cluster = name, await self._start(name)
        return await scenario(self._cluster)

    async def _start(self, name: str) -> Cluster | HostsCluster:
        sections = dict(SHARED[name])
        folder = self._folder / name
        shutil.rmtree(folder, ignore_errors=True)  # of one that a failed test has broken
        folder.mkdir()
        (folder / "webhook.keys").touch(mode=0o600)
        (folder / "webhook.keys").write_text(WEBHOOK_SECRET)
        if name == "mooncake":
            sections["head"] = {"port": free_ports(9)}
        if name == "killed":  # where no client sends a trace, none goes there
            sections["otel"] = {"endpoint": f"http://127.0.0.1:{free_ports(1)}", "sample": 0.0}
        if name == "models":
            path = write_models(folder, MODELS, self._models)
        else:
            family, roles = sections.pop("family", "flux"), sections.pop("roles", dict.fromkeys(STAGES, 1))
            model = any_steps(self._models("flux"), folder) if family == "flux-any-steps" else self._models(family)
            path = write_topology(folder, model, roles, sections)
        if name == "hosts":
            return await self._stack.enter_async_context(launch_on_hosts(path))
        return await self._stack.enter_async_context(launch(path, FREE_PORTS))

    async def _stop(self) -> None:
        cluster, self._cluster = self._cluster, None
        await self._stack.aclose()
        if isinstance(cluster, HostsCluster):
            assert set(cluster.exit_codes.values()) == {0}
        elif cluster:
            assert cluster.process.returncode == 0
            assert not list(cluster.topology.run_dir.glob("*")), "its sockets are gone"


async def all_ready(cluster: Cluster | HostsCluster) -> bool:
    """Whether the cluster takes requests and each of its processes runs, in the end."""
    try:
        async with asyncio.timeout(BOUND_S):
            while True:
                states = {child.state for child in (await cluster.children()).values()}
                if states == {"ready"} and await cluster.ready():
                    return True
                await asyncio.sleep(0.05)
    except (TimeoutError, BusError):
        return False


async def back(cluster: Cluster | HostsCluster, name: str, *, after_generation: int) -> None:
    """Until the component is ready in a later generation."""
    async with asyncio.timeout(BOUND_S):
        while True:
            with contextlib.suppress(BusError):  # its host is down
                child = (await cluster.children())[name]
                if child.generation > after_generation and child.state == "ready":
                    return
            await asyncio.sleep(0.02)


def any_steps(model: Path, folder: Path) -> Path:
    """A copy of a model whose serving config allows any number of steps."""
    copy = folder / "any-steps"
    shutil.copytree(model, copy)
    config = json.loads((copy / "triptych.json").read_text())
    config["ranges"]["num_inference_steps"] = [1, MANY_STEPS]
    (copy / "triptych.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="session")
def shared_clusters(
    models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SharedClusters]:
    shared = SharedClusters(models, tmp_path_factory.mktemp("shared"))
    yield shared
    shared.close()


@pytest.fixture
def on_cluster(request: pytest.FixtureRequest, shared_clusters: SharedClusters) -> Callable[[Scenario], Any]:
    """Run a coroutine function with the shared cluster that the test is marked with; returns what it returns."""
    (name,) = request.node.get_closest_marker("shared_cluster").args
    return lambda scenario: shared_clusters.run(name, scenario)


@pytest.fixture
def topology_file(tmp_path: Path, models: Callable[[str], Path]) -> Callable[..., Path]:
    """Writes a topology: sections as keyword arguments, `roles` as kind to number of instances."""

    def write(family: str = "flux", roles: dict[str, int] | None = None, **sections: dict[str, Any]) -> Path:
        return write_topology(tmp_path, models(family), roles or dict.fromkeys(STAGES, 1), sections)

    return write


@pytest.fixture
def topology_of(tmp_path: Path) -> Callable[..., Path]:
    """Writes a topology for a model's folder, of one instance of each stage or of `roles`."""

    def write(model: Path, roles: dict[str, int] | None = None) -> Path:
        return write_topology(tmp_path, model, roles or dict.fromkeys(STAGES, 1), {})

    return write


def write_topology(folder: Path, model: Path, roles: dict[str, int], sections: dict[str, dict[str, Any]]) -> Path:
    own = {
        "model": {"path": str(model), "dtype": "float32"},
        "state": {"path": str(folder / "state")},
        "transfer": {"pool_size": "16MiB"},
    }
    sections = dict(sections)
    role_keys, hosts = sections.pop("role_keys", {}), sections.pop("hosts", {})
    lines = []
    for name, keys in {name: own.get(name, {}) | sections.get(name, {}) for name in own | sections}.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_toml(value)}" for key, value in keys.items()]
    for kind, count in roles.items():
        lines += ["[[roles]]", f'kind = "{kind}"', f"count = {count}"]
        lines += [f"hosts = {hosts[kind]}"] if hosts else []
        lines += [f"{key} = {_toml(value)}" for key, value in role_keys.get(kind, {}).items()]
    for number, host in enumerate(sorted({host for names in hosts.values() for host in names}), start=2):
        lines += ["[[hosts]]", f'name = "{host}"', f'address = "127.0.0.{number}"']
    path = folder / "topology.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def write_models(folder: Path, shared: Mapping[str, SharedModel], models: Callable[[str], Path]) -> Path:
    """Write a topology of several models, each with its own instances of the three stages."""
    from triptych.tools.make_lora import make_lora  # imports torch

    lines = [f'[state]\npath = "{folder / "state"}"', '[transfer]\npool_size = "64MiB"']
    for name, model in shared.items():
        path = models(model.family)
        if model.task or model.copied:
            path = Path(shutil.copytree(path, folder / name))
        if model.task:
            config = path / SERVING_CONFIG_NAME
            config.write_text(json.dumps({**json.loads(config.read_text()), "task": model.task}))
        lines.append(f'[[models]]\nname = "{name}"\npath = "{path}"\ndtype = "float32"')
        for seed, (lora, scale) in enumerate(model.loras.items()):
            make_lora(path, folder / f"{lora}.safetensors", seed=seed)
            lines.append(f'[[models.lora]]\nname = "{lora}"\npath = "{lora}.safetensors"\nscale = {scale}')
        for stage in STAGES:
            count = model.denoisers if stage == "denoiser" else 1
            lines.append(f'[[models.roles]]\nkind = "{stage}"\ncount = {count}\nslots = {model.slots}')
            if stage == "denoiser":
                lines.append(f"max_batch = {model.max_batch}")
    file = folder / "topology.toml"
    file.write_text("\n".join(lines) + "\n")
    return file


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
