"""The topology: which components there are, where each is found, with which options they run, and what is refused.

`load_topology` reads it from a TOML file. Everything in it is either written in the file or follows from it, so every
process that reads the file knows where every other one is.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

import msgspec

from triptych.actors.errors import TopologyError, UnknownNameError
from triptych.actors.topology import paths
from triptych.actors.topology._hosts import (
    HOST_ADDRESS,
    LEAST_HOST_POOL_BYTES,
    bind_host,
    check_hosts,
    choose_engine,
    head_host,
    hosts_of,
    is_loopback,
    is_network,
    pool_hosts,
    pool_name,
    pool_size,
    tcp_address,
    transfer_ports,
)
from triptych.actors.topology._model_identity import ModelIdentity, identify_model
from triptych.actors.topology._model_source import ModelSource, absolute, find_source
from triptych.actors.topology._parser import parse_topology_file
from triptych.actors.topology._pools import largest_payload, pool_zones
from triptych.actors.topology.placed_hosts import PlacedHosts, read_placed_hosts, with_placed_hosts
from triptych.actors.topology.sections import (
    DENOISING_KINDS,
    LEAST_POOL_BYTES,
    STAGES,
    ApiSection,
    BusSection,
    HeadSection,
    HostSection,
    MemorySection,
    ModelSection,
    OtelSection,
    RoleKind,
    RoleSection,
    SchedulingPolicyName,
    Sections,
    StateSection,
    StoreSection,
    SupervisionSection,
    TransferSection,
    WebhooksSection,
    cache_size,
    parse_rate,
    parse_size,
    size_or_none,
)
from triptych.engines.backends import BACKENDS, DEFAULT, BackendSpec
from triptych.engines.step_cache_options import StepCacheError, parse_step_cache

ComponentKind = RoleKind | Literal["pool", "head", "api"]

_UNSAFE: Final = re.compile(r"[^a-z0-9_-]")
"""Characters that the name of a component cannot have: a point separates the name of an actor within it."""
_BUCKET_URL: Final = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[A-Za-z0-9_][A-Za-z0-9_.=-]*)*/?")
_MAX_ROLE_NAME: Final = 32
"""Most characters in the name of a role, so that the path of its socket is short enough."""


class Component(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the system."""

    name: str
    """"head", "api", "denoiser-0", "pool"; with `[[hosts]]` "pool-HOST" for each host that needs one, without them and
    with mooncake "pool-encoder", "pool-denoiser", "pool-decoder"."""
    kind: ComponentKind
    """Its kind, which `actors.supervision.COMPONENT_SPECS` maps to the code that builds it."""
    model: str = ""
    """Name of the model that it serves, as `Model.name`; "" for a pool, the head and the API, which serve all."""
    address: str
    """Address of its first actor's mailbox: `ipc:///path` or `tcp://host:port`."""
    bind: str = ""
    """Where that mailbox listens, if that is not `address`; else ""."""
    port: int
    """Its bus port; unused with ipc."""
    host: str = ""
    """Name of the host that it runs on; "" without `[[hosts]]`."""
    index: int = 0
    """Its number among the instances of its `[[roles]]` entry on its host."""
    device: str = "cpu"
    """Torch device."""
    slots: int = 0
    """Requests that it takes at a time; 0 unless it is an instance of a role."""
    policy: SchedulingPolicyName = "fifo"
    """Which of the requests that it has taken computes next."""
    max_batch: int = 1
    """Most requests whose denoising steps it computes in one call."""
    checkpoint_s: float = 0.0
    """Seconds between two checkpoints of a denoise; 0 if it stores none."""
    pool: str = ""
    """Name of the buffer pool that this instance uses, "" if none."""
    restart: Literal["permanent", "transient", "temporary"] = "permanent"
    """When the supervisor restarts it."""
    dtype: str = ""
    """Torch dtype of its weights and of its computation; "" unless it is an instance of a role."""
    quantization: Literal["none", "int8", "float8"] = "none"
    """Format of the weights of its linear layers."""
    offload: Literal["none", "model", "group"] = "none"
    """Which weights stay in the memory of the host until they are needed."""

    @property
    def on_gpu(self) -> bool:
        """Whether it computes on a CUDA device."""
        return self.device.startswith("cuda")


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """One model of the system, and where its files are."""

    section: ModelSection
    """Its section of the topology file."""
    folder: Path
    """Folder of the topology file, which its paths are relative to."""
    prompt_cache_bytes: int = 0
    """Bytes of the encoders' pool that its prompt cache may take; 0 if it is off or there are no encoders."""

    @property
    def name(self) -> str:
        """What requests give as `model`; "" if the topology does not say, which only a single model may omit."""
        return self.section.name

    @property
    def path(self) -> Path:
        """Absolute folder of the model: its index, its configurations, and its weights unless they are elsewhere."""
        return self.source.folder

    @property
    def source(self) -> ModelSource:
        """Where its files are; looks at the disk on each access."""
        return find_source(self.section, self.folder)

    @property
    def title(self) -> str:
        """Name of its file or repository, for when neither the topology nor the serving config names it; else ""."""
        source = self.source
        if source.checkpoint:
            return source.checkpoint.stem
        return "" if source.folder == self.absolute(self.section.path) else self.section.path

    @property
    def files(self) -> tuple[Path, ...]:
        """Absolute paths of what instances load: the model's folder, other weights, adapters, embeddings."""
        loras = [path for lora in self.section.lora for path in (lora.path, lora.path_2) if path]
        more = [*loras, *(each.path for each in self.section.embeddings)]
        return (*self.source.files, *map(self.absolute, more))

    @property
    def step_cache(self) -> str:
        """The step cache of its denoisers, which all have the same; "" for none."""
        return next((role.cache for role in self.section.roles if role.kind in DENOISING_KINDS), "")

    @property
    def identity(self) -> ModelIdentity | None:
        """What tells it from other models, None if its files are missing; blocks on the disk, raises `OSError`."""
        source = self.source
        found = identify_model(source.folder, source.checkpoint, [*source.components.values()], self.step_cache)
        if found is None or source.checkpoint or source.folder == self.absolute(self.section.path):
            return found
        # A newer snapshot of a repository has a folder of its own, and is another version of the same model.
        return msgspec.structs.replace(found, path=self.section.path)

    def absolute(self, path: str) -> Path:
        """Return the absolute path of a file or folder that the topology names."""
        return absolute(self.folder, path)


class Topology(msgspec.Struct, frozen=True, kw_only=True):
    """A checked topology; see `actors.topology.sections` for the keys of each section."""

    models: tuple[Model, ...]
    """At least one; the first serves requests that name none."""
    api: ApiSection
    head: HeadSection
    transfer: TransferSection
    memory: MemorySection
    supervision: SupervisionSection
    bus: BusSection
    state: StateSection
    store: StoreSection = StoreSection()
    webhooks: WebhooksSection = WebhooksSection()
    otel: OtelSection = OtelSection()
    components: tuple[Component, ...]
    """In start order: pools, role instances, head, api."""
    hosts: tuple[HostSection, ...] = ()
    """The machines; () or a single one where all components run on one."""
    path: Path
    """The TOML file, absolute."""
    run_dir: Path
    """Folder of the ipc sockets, 0700, short enough for the kernel's limit of 107 bytes."""
    state_dir: Path
    """Folder of everything that outlives the processes."""

    @property
    def keys_path(self) -> Path | None:
        """Absolute path of the file of API keys; None without keys."""
        return self._absolute(self.api.keys_file) if self.api.keys_file else None

    @property
    def webhook_keys_path(self) -> Path | None:
        """Absolute path of the file of secrets that sign webhooks; None without webhooks."""
        return self._absolute(self.webhooks.keys_file) if self.webhooks.keys_file else None

    def _absolute(self, file: str) -> Path:
        return (self.path.parent / Path(file).expanduser()).resolve()

    @property
    def engine(self) -> str:
        """The name of the transfer backend between pools, "auto" resolved."""
        return choose_engine(self.transfer, {c.host for c in self.components if c.kind == "pool"})

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
        """Return the component called `name`; raises `UnknownNameError`."""
        for component in self.components:
            if component.name == name:
                return component
        known = ", ".join(component.name for component in self.components)
        raise UnknownNameError(f"no component is called {name!r} in {self.path}; there are {known}")

    def host(self, name: str) -> HostSection:
        """Return the host called `name`; raises `UnknownNameError`."""
        for host in self.hosts:
            if host.name == name:
                return host
        known = ", ".join(host.name for host in self.hosts) or "none"
        raise UnknownNameError(f"no host is called {name!r} in {self.path}; there are {known}")

    def host_of(self, component: Component) -> HostSection | None:
        """Return the host that a component runs on; None without `[[hosts]]`."""
        return self.host(component.host) if component.host else None

    def on_host(self, name: str) -> tuple[Component, ...]:
        """Return the components of a host, in start order; raises `UnknownNameError`."""
        self.host(name)
        return tuple(component for component in self.components if component.host == name)

    @property
    def head_host(self) -> str:
        """Name of the host of the head and the API; "" without `[[hosts]]`."""
        return self.component("head").host

    @property
    def bus_heartbeat_s(self) -> float:
        """Seconds between two heartbeats of a TCP connection of the bus."""
        return self.bus.heartbeat_s or (0.5 if len(self.hosts) > 1 else 1.0)

    def supervisor_port(self, host: str) -> int:
        """Return the bus port of the supervisor of one of several hosts: they come after the components."""
        return self.head.port + len(self.components) + [each.name for each in self.hosts].index(host)

    def supervisor_address(self, host: HostSection) -> str:
        """Return the address by which other hosts reach the supervisor of one of several hosts."""
        return tcp_address(host.address, self.supervisor_port(host.name))

    def supervisor_bind(self, host: HostSection) -> str:
        """Return where that supervisor listens."""
        return tcp_address(bind_host(host), self.supervisor_port(host.name))

    @property
    def log_dir(self) -> Path:
        """The folder of the logs of this host's processes."""
        return self.state_dir / "logs"

    @property
    def log_bytes(self) -> int:
        """Most bytes that are kept of the log of each process, 0 for none."""
        return size_or_none(self.state.log_size)

    def pool_size(self, pool: Component) -> str:
        """Return the size of a pool, as it is written."""
        return pool_size(self.host_of(pool), self.transfer)

    def pool_bytes(self, pool: Component) -> int:
        """Return the size of a pool in bytes."""
        return parse_size(self.pool_size(pool))

    def zones(self, pool: Component) -> tuple[str, ...]:
        """Return the zones of a pool, as `_pools.pool_zones` does."""
        return pool_zones(self.components, pool.name)

    @property
    def largest_payload(self) -> int:
        """Most bytes of a payload from one stage to the next, which each pool must be able to hold."""
        pools = [component for component in self.components if component.kind == "pool"]
        most = [largest_payload(self.pool_bytes(pool), len(self.zones(pool))) for pool in pools]
        return min(most, default=largest_payload(self.transfer.pool_bytes))

    def transfer_ports(self, host: str) -> tuple[int, int]:
        """Return the first and the last port on which the pool of a host listens for other pools."""
        return transfer_ports(self.hosts, host)

    def starts_asleep(self, component: Component) -> bool:
        """Return whether an instance loads its weights only when the head asks: not all models may fit into memory."""
        bounded = self.memory.host or self.memory.card
        return bool(bounded) and self.model_of(component).section.sleep != "never"

    def model_of(self, component: Component) -> Model:
        """Return the model that an instance of a role serves."""
        return next(model for model in self.models if model.name == component.model)


def load_topology(path: Path | str, placed: PlacedHosts | None = None) -> Topology:
    """Read and check a topology file; raises `TopologyError`, whose `str()` is one clear sentence.

    `placed` says where its hosts are; by default, what the engine says that has placed this process. What depends on
    this machine (model folder, mooncake, devices) is checked by `actors.command.preflight` instead, so that any host
    can read any topology.
    """
    file = Path(path)
    sections = parse_topology_file(file)
    placed = placed or read_placed_hosts()
    if placed is not None:
        sections = with_placed_hosts(sections, placed)
    _check_sections(str(file), sections)
    resolved = file.resolve()
    run_dir = paths.run_dir(resolved)
    components = _components(sections, run_dir)
    _check_components(str(file), sections, components)
    transport = "tcp" if len(sections.hosts) > 1 else sections.bus.transport
    return Topology(
        models=_models(sections, resolved.parent),
        api=sections.api,
        head=sections.head,
        transfer=sections.transfer,
        memory=sections.memory,
        supervision=sections.supervision,
        bus=msgspec.structs.replace(sections.bus, transport=transport),
        state=sections.state,
        store=sections.store,
        webhooks=sections.webhooks,
        otel=sections.otel,
        components=components,
        hosts=sections.hosts,
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
    head = sections.head
    hosts = {host.name: host for host in sections.hosts}
    over_tcp = sections.bus.transport == "tcp" or len(hosts) > 1
    roles = [
        (model, role, host) for model in sections.models for role in model.roles for host in hosts_of(sections, role)
    ]
    begun: Counter[str] = Counter()
    rows: list[Component] = []

    def add(name: str, kind: ComponentKind, host: str, port: int = 0, index: int = 0) -> Component:
        others = sum(row.kind != "head" for row in rows)
        bound = port or (head.port if kind == "head" else head.port + 1 + others)
        address, bind = f"ipc://{run_dir}/{name}", ""
        if over_tcp:
            section = hosts.get(host)
            address = tcp_address(section.address if section else "127.0.0.1", bound)
            bind = tcp_address(bind_host(section), bound) if section else ""
            bind = "" if bind == address else bind
        rows.append(Component(name=name, kind=kind, address=address, bind=bind, port=bound, host=host, index=index))
        return rows[-1]

    for pool, host in dict.fromkeys((pool_name(sections, role, host), host) for _, role, host in roles):
        if pool:
            add(pool, "pool", host)
    for model, role, host in roles:
        name = _role_name(sections, model, role)
        for index in range(role.count):
            rows[-1] = msgspec.structs.replace(
                add(f"{name}-{begun[name]}", role.kind, host, role.port and role.port + index, index),
                model=model.name,
                device=role.device,
                slots=role.slots,
                policy=role.policy,
                max_batch=role.max_batch,
                checkpoint_s=role.checkpoint_s if role.kind == "denoiser" else 0.0,
                restart=role.restart,
                pool=pool_name(sections, role, host),
                dtype=role.dtype or model.dtype,
                quantization=role.quantization,
                offload=role.offload,
            )
            begun[name] += 1
    add("head", "head", head_host(sections))
    add("api", "api", head_host(sections))
    return tuple(rows)


def _check_sections(file: str, sections: Sections) -> None:
    """Raise `TopologyError` for the first thing that cannot work; looks at nothing but the file."""
    _check_api(file, sections)
    _check_webhooks(file, sections)
    check_hosts(file, sections)
    _check_network(file, sections)
    _check_size(file, sections)
    _check_cache(file, sections)
    _check_state(file, sections)
    _check_store(file, sections)
    _check_memory(file, sections)
    _check_models(file, sections)
    for model in sections.models:
        _check_kinds(file, sections, model)
        _check_batches(file, sections, model)
        _check_step_caches(file, sections, model)
        _check_loras(file, sections, model)
    _check_names(file, sections)


def _check_components(file: str, sections: Sections, components: tuple[Component, ...]) -> None:
    """Raise `TopologyError` if two components of a host, or one and HTTP, share a port or need one above 65535."""
    taken = {(head_host(sections), sections.api.port): "[api] port"}
    first_supervisor = sections.head.port + len(components)
    ports = [(component.host, component.port, component.name) for component in components]
    if len(sections.hosts) > 1:
        hosts = enumerate(sections.hosts, start=first_supervisor)
        ports += [(host.name, port, f"the supervisor of {host.name}") for port, host in hosts]
    for host, port, name in ports:
        if port > 65535:
            raise TopologyError(file, "[head] port", f"leads to port {port} for {name}", "choose a lower one")
        other = taken.setdefault((host, port), name)
        if other != name:
            on = f" on {host}" if host else ""
            problem = f"{port} is used twice{on}, by {other} and by {name}"
            raise TopologyError(file, "port", problem, "give one of them another port")
    names = {component.name for component in components}
    for each in sections.hosts:
        if each.name in names:
            problem = f'has the name of the component "{each.name}"'
            raise TopologyError(file, "[[hosts]]", problem, "give the host another name")
        if each.name in pool_hosts(sections) and len(pool_hosts(sections)) > 1:
            first, last = transfer_ports(sections.hosts, each.name)
            for (host, port), name in taken.items():
                if host == each.name and first <= port <= last:
                    written = f'= "{each.transfer_ports}"' if each.transfer_ports else f"({first}-{last})"
                    problem = f"{written} has port {port}, which {name} listens on"
                    fix = "choose a range of ports that nothing else uses"
                    raise TopologyError(file, f'[[hosts]] "{each.name}" transfer_ports', problem, fix)


def _role_name(sections: Sections, model: ModelSection, role: RoleSection) -> str:
    """Return the name of a role's instances, without their number."""
    if role.name or len(sections.models) == 1:
        return role.name or role.kind
    return f"{_UNSAFE.sub('-', model.name.lower())}-{role.kind}"


def _model_label(sections: Sections, model: ModelSection, key: str = "") -> str:
    """Return how an error names a key of a model, or the model itself."""
    table = "[model]" if len(sections.models) == 1 else f'[[models]] "{model.name}"'
    return f"{table} {key}".strip()


def _roles_label(sections: Sections, model: ModelSection) -> str:
    """Return how an error names the roles of a model."""
    return "[[roles]]" if len(sections.models) == 1 else f'[[models.roles]] of "{model.name}"'


def _check_api(file: str, sections: Sections) -> None:
    api = sections.api
    if not is_loopback(api.host) and not api.keys_file:
        problem = f'= "{api.host}" would be open to the network, and there are no keys to keep others out'
        raise TopologyError(file, "[api] host", problem, 'use "127.0.0.1", or give clients keys with [api] keys_file')
    if api.public_url and not _is_site(api.public_url):
        problem, fix = f'= "{api.public_url}" is not the URL of a site', 'write it as in "https://pictures.example.com"'
        raise TopologyError(file, "[api] public_url", problem, fix)
    if sections.otel.endpoint and not _is_site(sections.otel.endpoint):
        problem, fix = f'= "{sections.otel.endpoint}" is not a URL', 'write it as in "http://127.0.0.1:4318"'
        raise TopologyError(file, "[otel] endpoint", problem, fix)
    for host in api.allowed_hosts:
        if not HOST_ADDRESS.fullmatch(host):
            fix = 'write a name alone, as in "pictures.example.com"'
            raise TopologyError(file, "[api] allowed_hosts", f'have "{host}", which is not a host name', fix)
    if api.rate_limit:
        try:
            parse_rate(api.rate_limit)
        except ValueError:
            problem, fix = f'= "{api.rate_limit}" is not a rate', 'write it as in "60/min", with s, min, h or day'
            raise TopologyError(file, "[api] rate_limit", problem, fix) from None


def _check_webhooks(file: str, sections: Sections) -> None:
    webhooks, kept_s = sections.webhooks, sections.state.keep_requests_s
    for host in webhooks.hosts:
        if not (is_network(host) or HOST_ADDRESS.fullmatch(host.removeprefix("*."))):
            problem = f'have "{host}", which is not a host name, an address or a network'
            fix = 'write it as in "hooks.example.com", "*.example.com", "10.0.0.7" or "10.0.0.0/8"'
            raise TopologyError(file, "[webhooks] hosts", problem, fix)
    if webhooks.hosts and not webhooks.keys_file:
        fix = 'add keys_file = "a file with a line whsec_..." to it, as docs/http-api.md shows'
        raise TopologyError(file, "[webhooks]", "has hosts, and no secret to sign with", fix)
    if webhooks.hosts and webhooks.give_up_s > kept_s:
        problem = f"= {webhooks.give_up_s:g} is longer than ended requests are kept"
        fix = f"make it at most [state] keep_requests_s = {kept_s:g}"
        raise TopologyError(file, "[webhooks] give_up_s", problem, fix)


def _is_site(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and not (url.query or url.fragment)
    except ValueError:
        return False


def _check_network(file: str, sections: Sections) -> None:
    engine = choose_engine(sections.transfer, pool_hosts(sections))
    if BACKENDS[engine].is_open_to_network and not sections.transfer.trusted_network:
        problem = "would let everybody who reaches this host read and write the pools' memory, for it has no keys"
        fix = (
            "keep its ports behind a firewall and say trusted_network = true, as docs/security.md shows, "
            f'or use engine = "{DEFAULT}"'
        )
        raise TopologyError(file, f'[transfer] engine = "{engine}"', problem, fix)


def _check_size(file: str, sections: Sections) -> None:
    size = sections.transfer.pool_size
    try:
        nbytes = parse_size(size)
    except ValueError:
        problem = f'= "{size}" is not a size'
        raise TopologyError(file, "[transfer] pool_size", problem, 'write it as in "256MiB" or "1.5GiB"') from None
    least = LEAST_HOST_POOL_BYTES if len(sections.hosts) > 1 else LEAST_POOL_BYTES
    if nbytes < least:
        problem = f'= "{size}" is less than {least} bytes'
        raise TopologyError(file, "[transfer] pool_size", problem, 'make it larger, as in "256MiB"')


def _check_state(file: str, sections: Sections) -> None:
    for key in ("max_requests_size", "max_artifacts_size", "max_uploads_size"):
        size = getattr(sections.state, key)
        try:
            parse_size(size)
        except ValueError:
            fix = 'write it as in "512MiB" or "32GiB"'
            raise TopologyError(file, f"[state] {key}", f'= "{size}" is not a size', fix) from None
    try:
        size_or_none(sections.state.log_size)
    except ValueError:
        problem, fix = f'= "{sections.state.log_size}" is not a size', 'write it as in "4MiB", or "0" for none'
        raise TopologyError(file, "[state] log_size", problem, fix) from None


def _check_store(file: str, sections: Sections) -> None:
    url, folder = sections.store.url, sections.store.folder
    fits = not url or (
        _BUCKET_URL.fullmatch(url) if folder is None else folder.is_absolute() and ".." not in folder.parts
    )
    if not fits:
        problem, fix = (
            f'= "{url}" is no place for files',
            'write it as in "/mnt/shared/triptych" or "s3://bucket/prefix"',
        )
        raise TopologyError(file, "[store] url", problem, fix)


def _check_memory(file: str, sections: Sections) -> None:
    for key in ("host", "card"):
        size = getattr(sections.memory, key)
        try:
            parse_size(size or "1B")
        except ValueError:
            problem, fix = f'= "{size}" is not a size', 'write it as in "24GiB", or leave it out'
            raise TopologyError(file, f"[memory] {key}", problem, fix) from None


def _check_cache(file: str, sections: Sections) -> None:
    pool_size, together = sections.transfer.pool_size, 0
    for model in sections.models:
        size, where = model.prompt_cache, _model_label(sections, model, "prompt_cache")
        try:
            together += cache_size(size, parse_size(pool_size), len(sections.models))
        except ValueError:
            problem = f'= "{size}" is not a size'
            fix = 'write it as in "64MiB", or "0" for none'
            raise TopologyError(file, where, problem, fix) from None
        if together > parse_size(pool_size) // 2:
            besides = " with those before it" if len(sections.models) > 1 else ""
            problem = f'= "{size}" is{besides} more than half of [transfer] pool_size = "{pool_size}"'
            raise TopologyError(file, where, problem, "make it smaller, or the pool larger")


def _check_models(file: str, sections: Sections) -> None:
    if len(sections.models) == 1:
        return
    for number, model in enumerate(sections.models, start=1):
        if not model.name:
            fix = 'add name = "what requests are to give as model"'
            raise TopologyError(file, f"[[models]] no. {number}", "lacks the key name", fix)
    name, count = Counter(model.name for model in sections.models).most_common(1)[0]
    if count > 1:
        raise TopologyError(file, "[[models]]", f'use the name "{name}" {count} times', "give each a name of its own")


def _check_kinds(file: str, sections: Sections, model: ModelSection) -> None:
    kinds, where = {role.kind for role in model.roles}, _roles_label(sections, model)
    if not kinds:
        fix = "add one for each of encoder, denoiser and decoder, or one monolithic"
        raise TopologyError(file, where, "are missing", fix)
    if "monolithic" in kinds:
        if kinds != {"monolithic"}:
            others = ", ".join(sorted(kinds - {"monolithic"}))
            fix = "keep either the stages or monolithic"
            raise TopologyError(file, where, f"mix monolithic with {others}", fix)
        return
    missing = [stage for stage in STAGES if stage not in kinds]
    if missing:
        header = "[[roles]]" if len(sections.models) == 1 else "[[models.roles]]"
        fix = f'add a {header} with kind = "{missing[0]}"'
        raise TopologyError(file, where, f"have no {' and no '.join(missing)}", fix)


def _check_batches(file: str, sections: Sections, model: ModelSection) -> None:
    for role in model.roles:
        where = f'{_roles_label(sections, model)} kind = "{role.kind}" max_batch'
        problem = f"= {role.max_batch}"
        if role.max_batch > 1 and role.kind not in DENOISING_KINDS:
            problem += ", but only a denoiser or a monolithic process runs denoising steps"
            raise TopologyError(file, where, problem, "give it to the denoiser")
        if role.max_batch > role.slots:
            problem += f" is more than the {role.slots} requests that one instance takes at a time"
            raise TopologyError(file, where, problem, f"write slots = {role.max_batch} as well, or a smaller max_batch")


def _check_step_caches(file: str, sections: Sections, model: ModelSection) -> None:
    where = _roles_label(sections, model)
    for role in model.roles:
        try:
            parse_step_cache(role.cache)
        except StepCacheError as error:
            fix = 'write it as in "first_block:0.1", as docs/step-caches.md shows'
            raise TopologyError(file, f"{where} cache", f'= "{role.cache}" {error}', fix) from None
        if role.cache and role.kind not in DENOISING_KINDS:
            problem = f'= "{role.cache}", but only a denoiser or a monolithic process runs denoising steps'
            raise TopologyError(file, f'{where} kind = "{role.kind}" cache', problem, "give it to the denoiser")
    different = sorted({role.cache for role in model.roles if role.kind in DENOISING_KINDS})
    if len(different) > 1:
        problem = f'has the values "{different[0]}" and "{different[1]}", so that one request could have either image'
        raise TopologyError(file, f"{where} cache", problem, "give all denoisers of a model the same")


def _check_names(file: str, sections: Sections) -> None:
    header = "[[roles]]" if len(sections.models) == 1 else "[[models.roles]]"
    names = [_role_name(sections, model, role) for model in sections.models for role in model.roles]
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise TopologyError(file, header, f"use the name {name} {count} times", "give each a name of its own with name")
    for name in names:
        if len(name) > _MAX_ROLE_NAME or not name[0].isalpha():
            problem = (
                f"would be called {name}, which is not a name of at most {_MAX_ROLE_NAME} letters, digits, - and _"
            )
            raise TopologyError(file, header, problem, "give it a name of its own with name")


def _check_loras(file: str, sections: Sections, model: ModelSection) -> None:
    loras = Counter(("lora", "name", lora.name) for lora in model.lora)
    words = Counter(("embeddings", "token", embedding.token) for embedding in model.embeddings)
    for (section, key, name), count in (loras + words).items():
        if count > 1:
            where = f"[[model.{section}]]" if len(sections.models) == 1 else f'[[models.{section}]] of "{model.name}"'
            problem = f'use the {key} "{name}" {count} times'
            raise TopologyError(file, where, problem, f"give each a {key} of its own")
