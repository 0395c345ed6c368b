"""The topology: which components there are, where each is found, and with which options they run.

A topology is read from a TOML file by `load_topology`. Everything in it is either written in the file or follows
from it, so that every process that reads the file knows where every other one is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from triptych.actors.errors import UnknownNameError
from triptych.actors.topology import paths
from triptych.actors.topology._model_identity import ModelIdentity, identify_model
from triptych.actors.topology._parser import parse_topology_file
from triptych.actors.topology.checks import check_components, check_sections, role_name
from triptych.actors.topology.model_source import ModelSource, absolute, find_source
from triptych.actors.topology.sections import (
    STAGES,
    ApiSection,
    BusSection,
    HeadSection,
    MemorySection,
    ModelSection,
    RoleSection,
    Sections,
    StateSection,
    SupervisionSection,
    TransferSection,
    cache_size,
)
from triptych.engines.backends import BACKENDS, BackendSpec, resolve_engine

ComponentKind = Literal["pool", "encoder", "denoiser", "decoder", "monolithic", "head", "api"]


class Component(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the cluster."""

    name: str
    """"head", "api", "denoiser-0", "pool", or with mooncake "pool-encoder", "pool-denoiser", "pool-decoder"."""
    kind: ComponentKind
    """What it is; see `actors.supervision._component_specs`."""
    model: str = ""
    """Name of the model that it serves, as `Model.name`; "" for a pool, the head and the API, which serve all."""
    address: str
    """Where its first actor's mailbox is: `ipc:///path` or `tcp://host:port`."""
    port: int
    """Its bus port; unused with ipc."""
    index: int = 0
    """Its number among the instances of its `[[roles]]` entry."""
    device: str = "cpu"
    """Torch device."""
    slots: int = 0
    """Requests that it takes at a time; 0 for what is not a role."""
    pool: str = ""
    """Name of the buffer pool that this instance uses, "" if none."""
    restart: Literal["permanent", "transient", "temporary"] = "permanent"
    """When the supervisor starts it again."""
    dtype: str = ""
    """Torch dtype of its weights and of its computation; "" for what is not a role."""
    quantization: Literal["none", "int8", "float8"] = "none"
    """What the weights of its linear layers are held as."""
    offload: Literal["none", "model", "group"] = "none"
    """What of its weights rests in the memory of the host."""

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a CUDA device."""
        return self.device.startswith("cuda")


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One model of a system, and where its files are."""

    section: ModelSection
    """What the file says of it."""
    folder: Path
    """That of the topology file, which its paths are relative to."""
    prompt_cache_bytes: int = 0
    """What its prompt cache may take of the encoders' pool; 0 where it is off, or nothing is encoded apart."""

    @property
    def name(self) -> str:
        """What requests give as `model`; "" where the topology does not say, and it is the only model then."""
        return self.section.name

    @property
    def path(self) -> Path:
        """Absolute folder of the model: its index, its configurations, and its weights if they are nowhere else."""
        return self.source.folder

    @property
    def source(self) -> ModelSource:
        """Where its files are; looks at the disk each time."""
        return find_source(self.section, self.folder)

    @property
    def title(self) -> str:
        """Name after its file or repository, if neither topology nor serving config has one; "" = after its folder."""
        source = self.source
        if source.checkpoint:
            return source.checkpoint.stem
        return "" if source.folder == self.absolute(self.section.path) else self.section.path

    @property
    def files(self) -> tuple[Path, ...]:
        """Absolute places of what instances load: the model's folder, other weights, adapters, embeddings."""
        loras = [path for lora in self.section.lora for path in (lora.path, lora.path_2) if path]
        more = [*loras, *(each.path for each in self.section.embeddings)]
        return (*self.source.files, *map(self.absolute, more))

    @property
    def identity(self) -> ModelIdentity | None:
        """What tells it from other models, None where it is not there; blocks on the disk, raises `OSError`."""
        source = self.source
        found = identify_model(source.folder, source.checkpoint, [*source.components.values()])
        if found is None or source.checkpoint or source.folder == self.absolute(self.section.path):
            return found
        # A newer snapshot of a repository, in a folder of its own, is another version of the same model.
        return msgspec.structs.replace(found, path=self.section.path)

    def absolute(self, path: str) -> Path:
        """Absolute place of a file or folder that the topology names."""
        return absolute(self.folder, path)


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """A checked topology; see `actors.topology.sections` for the keys of each section."""

    models: tuple[Model, ...]
    """At least one; the first is that of requests that name none."""
    api: ApiSection
    head: HeadSection
    transfer: TransferSection
    memory: MemorySection
    supervision: SupervisionSection
    bus: BusSection
    state: StateSection
    components: tuple[Component, ...]
    """In start order: pools, role instances, head, api."""
    path: Path
    """The TOML file, absolute."""
    run_dir: Path
    """Folder of the ipc sockets, 0700, short enough for the kernel's limit of 107 bytes."""
    state_dir: Path
    """Folder of everything that outlives the processes."""

    @property
    def keys_path(self) -> Path | None:
        """Absolute place of the file of API keys; None without keys."""
        return (self.path.parent / Path(self.api.keys_file).expanduser()).resolve() if self.api.keys_file else None

    @property
    def engine(self) -> str:
        """The name of the transfer backend, "auto" resolved."""
        return resolve_engine(self.transfer.engine)

    @property
    def backend(self) -> BackendSpec:
        """What is known about the transfer backend."""
        return BACKENDS[self.engine]

    @property
    def url(self) -> str:
        """Base URL of the API, without a slash at the end."""
        host = f"[{self.api.host}]" if ":" in self.api.host else self.api.host
        return f"http://{host}:{self.api.port}"

    def component(self, name: str) -> Component:
        """The component of that name; raises `UnknownNameError`."""
        for component in self.components:
            if component.name == name:
                return component
        known = ", ".join(component.name for component in self.components)
        raise UnknownNameError(f"no component is called {name!r} in {self.path}; there are {known}")

    def starts_asleep(self, component: Component) -> bool:
        """Whether a role waits for the head before it loads its weights: there may not be room for those of all."""
        bounded = self.memory.host or self.memory.card
        return bool(bounded) and self.model_of(component).section.sleep != "never"

    def model_of(self, component: Component) -> Model:
        """The model that a role serves."""
        return next(model for model in self.models if model.name == component.model)


def load_topology(path: Path | str) -> Topology:
    """Read and check a topology file; raises `TopologyError`, whose `str()` is one clear sentence.

    What depends on this machine (model folder, mooncake, devices) is checked by `actors.command.preflight` instead, so
    that any host can read any topology.
    """
    file = Path(path)
    sections = parse_topology_file(file)
    check_sections(str(file), sections)
    resolved = file.resolve()
    run_dir = paths.run_dir(resolved)
    components = _components(sections, run_dir)
    check_components(str(file), sections, components)
    return Topology(
        models=_models(sections, resolved.parent),
        api=sections.api,
        head=sections.head,
        transfer=sections.transfer,
        memory=sections.memory,
        supervision=sections.supervision,
        bus=sections.bus,
        state=sections.state,
        components=components,
        path=resolved,
        run_dir=run_dir,
        state_dir=paths.state_dir(resolved, sections.state.path),
    )


def _models(sections: Sections, folder: Path) -> tuple[Model, ...]:
    models = []
    for section in sections.models:
        encodes_apart = any(role.kind == "encoder" for role in section.roles)
        nbytes = cache_size(section.prompt_cache, sections.transfer.pool_bytes, len(sections.models))
        models.append(Model(section=section, folder=folder, prompt_cache_bytes=nbytes if encodes_apart else 0))
    return tuple(models)


def _components(sections: Sections, run_dir: Path) -> tuple[Component, ...]:
    bus, head, transfer = sections.bus, sections.head, sections.transfer
    roles = [(model, role) for model in sections.models for role in model.roles]
    rows: list[Component] = []

    def add(name: str, kind: ComponentKind, port: int = 0, index: int = 0) -> Component:
        others = sum(row.kind != "head" for row in rows)
        bound = port or (head.port if kind == "head" else head.port + 1 + others)
        address = f"ipc://{run_dir}/{name}" if bus.transport == "ipc" else f"tcp://127.0.0.1:{bound}"
        rows.append(Component(name=name, kind=kind, address=address, port=bound, index=index))
        return rows[-1]

    for pool in dict.fromkeys(_pool_of(role, transfer) for _, role in roles):
        if pool:
            add(pool, "pool")
    for model, role in roles:
        for index in range(role.count):
            name = f"{role_name(sections, model, role)}-{index}"
            rows[-1] = msgspec.structs.replace(
                add(name, role.kind, role.port and role.port + index, index),
                model=model.name,
                device=role.device,
                slots=role.slots,
                restart=role.restart,
                pool=_pool_of(role, transfer),
                dtype=role.dtype or model.dtype,
                quantization=role.quantization,
                offload=role.offload,
            )
    add("head", "head")
    add("api", "api")
    return tuple(rows)


def _pool_of(role: RoleSection, transfer: TransferSection) -> str:
    if role.kind not in STAGES:
        return ""
    return "pool" if BACKENDS[resolve_engine(transfer.engine)].shared_memory else f"pool-{role.kind}"
