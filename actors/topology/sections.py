"""The sections of a topology file as typed structs: every key, its default and what it means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from triptych.engines.backends import AUTO, BACKENDS

RoleKind = Literal["encoder", "denoiser", "decoder", "monolithic"]
STAGES: Final = ("encoder", "denoiser", "decoder")
DENOISING_KINDS: Final = ("denoiser", "monolithic")
"""The kinds of roles that run denoising steps."""

# The description of a type tells the reader of an error what a value should be.
Port = Annotated[int, Meta(ge=1, le=65535, description="a port from 1 to 65535")]
Count = Annotated[int, Meta(ge=1, description="a whole number, at least 1")]
Natural = Annotated[int, Meta(ge=0, description="a whole number, at least 0")]
Seconds = Annotated[float, Meta(gt=0, description="a number of seconds above zero")]
SecondsOrNone = Annotated[float, Meta(ge=0, description="a number of seconds, or 0 for no bound")]
PortOrRule = Annotated[int, Meta(ge=0, le=65535, description="a port from 1 to 65535, or 0 for the rule")]
Device = Annotated[str, Meta(pattern=r"^(cpu|cuda(:[0-9]+)?)$", description='"cpu", "cuda" or "cuda:N"')]
RoleName = Annotated[
    str,
    Meta(
        pattern=r"^([a-z][a-z0-9_-]{0,31})?$",
        description="at most 32 lower-case letters, digits, - and _, starting with a letter",
    ),
]

HostName = Annotated[
    str,
    Meta(
        pattern=r"^[a-z][a-z0-9-]{0,31}$",
        description="1 to 32 lower-case letters, digits and -, starting with a letter",
    ),
]
HostNameOrRule = Annotated[str, Meta(description="the name of a [[hosts]] entry")]
HostNames = Annotated[tuple[str, ...], Meta(description='a list of names of [[hosts]] entries, such as ["b", "c"]')]
PortRange = Annotated[
    str, Meta(pattern=r"^([0-9]{1,5}-[0-9]{1,5})?$", description='the first and the last port, as in "21000-21015"')
]
ModelName = Annotated[
    str,
    Meta(
        pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,63})?$",
        description="at most 64 letters, digits, _, . and -, starting with a letter or digit",
    ),
]
LoraName = Annotated[
    str,
    Meta(pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="1 to 64 letters, digits, _, . and -"),
]
Token = Annotated[str, Meta(pattern=r"^\S{1,64}$", description="a word of at most 64 characters, without blanks")]
Variant = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{0,32}$", description='the name of a variant, such as "fp16"')]
Components = Annotated[
    dict[str, str], Meta(description='a table of files or folders, as in transformer = "flux.safetensors"')
]
Scale = Annotated[float, Meta(ge=-4, le=4, description="a number from -4 to 4")]
Share = Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")]
OptionValue = bool | int | float | str | tuple[int | float, ...]
Options = Annotated[
    dict[str, OptionValue],
    Meta(description="a table whose values are texts, numbers, true or false, or lists of numbers"),
]
DispatchName = Literal["round_robin", "max_free_slots", "least_loaded"]
SchedulingPolicyName = Literal["fifo", "fair", "shortest_remaining", "deadline"]
Dtype = Literal["float32", "float16", "bfloat16"]
if TYPE_CHECKING:
    EngineName: TypeAlias = str
else:  # Literals, so that an error lists the choices
    EngineName = Literal[(AUTO, *BACKENDS)]

Hosts = Annotated[tuple[str, ...], Meta(description='a list of host names, such as ["pictures.example.com"]')]
WebhookHosts = Annotated[
    tuple[str, ...],
    Meta(description='a list of host names, addresses and networks, such as ["hooks.example.com", "10.0.0.0/8"]'),
]

S3_SCHEME: Final = "s3://"
LEAST_POOL_BYTES: Final = 8192
"""Two pages: one for the inputs of a stage, one for its outputs."""
_UNITS: Final = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_RATE: Final = re.compile(r"([1-9][0-9]{0,8})/(s|min|h|day)")
_PERIODS: Final = {"s": 1.0, "min": 60.0, "h": 3600.0, "day": 86_400.0}


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One table of the file; every key has a default, unless the table is meaningless without it."""

    earlier_names: ClassVar[Mapping[str, str]] = {}
    """Keys by the name that they had in an earlier version, which is still read, with a warning."""


class LoraSection(Section, frozen=True):
    """One `[[model.lora]]` entry: an adapter that requests choose by name."""

    name: LoraName
    """What requests give as `lora`."""
    path: str
    """A `.safetensors` file, or a folder with exactly one, relative to the topology file."""
    scale: Scale = 1.0
    """Its strength in requests that give no `lora_scale`."""
    path_2: str = ""
    """The file for `transformer_2`, of an adapter in two files for a model with two transformers (Wan 2.2); "" = there
    is no second file."""


class EmbeddingSection(Section, frozen=True):
    """One `[[model.embeddings]]` entry: a word that the model learns (textual inversion)."""

    token: Token
    """The word as it is written in prompts."""
    path: str
    """A `.safetensors` file with its vectors, relative to the topology file."""


class ModelSection(Section, frozen=True):
    """`[model]`: the model that is served; with several models, one `[[models]]` entry."""

    path: str
    """The folder of a model in the layout of diffusers; a checkpoint in one file (`.safetensors` or `.gguf`), with
    `config`; or the id of a repository in the local cache of the hub, such as "stabilityai/sdxl-turbo". Paths are
    relative to the topology file. Nothing is ever downloaded. `Model.path` is the absolute folder."""
    revision: str = ""
    """Branch, tag or commit of that repository; "" = its main branch."""
    config: str = ""
    """With a checkpoint: the folder, or the id of a repository, with the configurations and tokenizers of a model of
    the same kind. It needs weights only of components that the checkpoint lacks."""
    components: Components = {}
    """Table `[model.components]`: replaces components of the model. The key is the component's name, the value a
    `.safetensors` or `.gguf` file with its weights, or a folder with its weights and its configuration."""
    name: ModelName = ""
    """What requests give as `model`. Each `[[models]]` entry needs one; "" = the name in the model's serving config,
    else that of its folder."""
    dtype: Dtype = "bfloat16"
    """Type of the weights and of the computation."""
    task: str | tuple[str, ...] = ""
    """Such as `text2image`; or a list of tasks, or `any` for all that the folder can do: then the inputs of a request
    select its task, and the weights for all of them are loaded; "" = the task in the model's serving config, else that
    of the class that its index names. See docs/models.md."""
    route: Literal["", "modular", "classic"] = ""
    """`modular` runs the pipeline as diffusers' blocks, `classic` as the class that the model's index names; "" = the
    blocks if they can do what the class does, else the class. See docs/models.md."""
    variant: Variant = ""
    """Which weight files of a component are read if it has several variants, such as "fp16"; "" = the plain files, else
    the only variant. A component that has only plain files is read from those."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model, for its pipeline or a component, is run, with all rights of the
    user of these processes. Read that code first; see docs/security.md."""
    prompt_cache: str = ""
    """Memory in the encoders' pool that keeps encoder outputs for requests with the same prompt: "" = a quarter of
    `[transfer] pool_size`, shared among the models, "0" = none, else a size; all together at most half of the pool.
    Without encoders there is no prompt cache."""
    scheduler: Options = {}
    """Table `[model.scheduler]`: the scheduler of requests that choose none. `class` is the name of its class, such as
    `DPMSolverMultistepScheduler`; the other keys replace settings of the model's own, such as
    `use_karras_sigmas = true`. `/v1/models` lists the classes that a model can use, and their settings."""
    guider: Options = {}
    """Table `[model.guider]`: the same for the guider of a model that has one, such as
    `class = "AdaptiveProjectedGuidance"`."""
    vae_tiling: bool = False
    """Whether the VAE computes in tiles, which takes less memory and changes the image slightly."""
    vae_tiling_options: Options = {}
    """Sizes of the tiles, if the VAE takes any, such as `tile_sample_min_height = 256`."""
    vae_slicing: bool = False
    """Whether the VAE computes one image of a batch at a time."""
    sleep: Literal["auto", "never"] = "auto"
    """Whether its weights may leave memory while other models need the room; see `MemorySection`."""
    lora: tuple[LoraSection, ...] = ()
    """Adapters, which every instance loads when it starts; see `LoraSection`."""
    embeddings: tuple[EmbeddingSection, ...] = ()
    """Words that the model learns; see `EmbeddingSection`."""
    roles: tuple[RoleSection, ...] = ()
    """The processes that serve it; see `RoleSection`. For `[model]` they are written `[[roles]]`."""


class HostSection(Section, frozen=True):
    """One `[[hosts]]` entry: a machine. Without any, all components run on one machine, which needs no entry."""

    name: HostName
    """What `host` of other sections and `triptych up FILE --host NAME` call it."""
    address: str = ""
    """Address or name by which the other hosts reach it; "" = that of the node that `triptych up FILE --ray` finds for
    it, which may be another one later. With loopback addresses for all, such as 127.0.0.2 and
    127.0.0.3, one machine can try what several will do."""
    public_key: str = ""
    """Public half of its bus key, which `triptych keys FILE --host NAME` prints on that host; each host lets in only
    the keys that are listed. Hosts with loopback addresses need none."""
    bind: str = ""
    """Where the mailboxes of its components listen: an address, an interface or "*" for all; "" = `address`, or all
    where that is a name."""
    transfer_address: str = ""
    """Address by which other hosts' pools reach its memory, such as that of a faster network; "" = `address`."""
    transfer_ports: PortRange = ""
    """Ports on which its pool listens for other pools, first and last: what a firewall has to let through, and only
    from the other hosts. "" = 16 ports, from 21000 on for the first host, from 21016 on for the second and so on. A
    pool takes two of them, and others when it is restarted."""
    ib_device: str = ""
    """Its RDMA device; "" = that of `[transfer]`."""
    pool_size: str = ""
    """Memory of its buffer pool, with a unit; "" = that of `[transfer]`."""
    ssh: str = ""
    """Where `triptych up FILE --ssh` logs in, such as "triptych@node-7" or a `Host` of `~/.ssh/config`; "" =
    `address`."""
    ssh_command: str = "triptych"
    """The command there, as the shell takes it, such as "~/triptych/.venv/bin/triptych"."""
    ssh_folder: str = ""
    """Folder there that the topology file is written to, and that its relative paths are relative to; "" = the same
    path as here."""


class ApiSection(Section, frozen=True):
    """`[api]`: the HTTP API."""

    host: str = "127.0.0.1"
    """Address to listen on; without `keys_file` it must be a loopback address."""
    port: Port = 8000
    """TCP port of HTTP."""
    public_url: str = ""
    """Where clients reach the API, such as "https://pictures.example.com" behind a proxy: the start of URLs in answers;
    "" = the address that the client used."""
    allowed_hosts: Hosts = ()
    """Host names under which clients may reach the API, besides loopback, `host` and that of `public_url`; also the
    sites whose pages may call it."""
    keys_file: str = ""
    """File with a line `name:key` for each client, relative to the topology file, of mode 0600. Then each request
    needs one of the keys, and sees only what was made with a key of the same name; "" = no keys."""
    rate_limit: str = ""
    """Most requests that one key (without keys: all clients together) may start, such as "60/min"; the units are s,
    min, h and day; "" = no limit."""
    max_connections: Count = 1024
    """Most open connections; any more are answered with 503."""


class WebhooksSection(Section, frozen=True):
    """`[webhooks]`: calls to `webhook_url` of a request once it has ended; without `hosts` there are none."""

    hosts: WebhookHosts = ()
    """Who may be called: names ("hooks.example.com", or "*.example.com" for all below it), addresses and networks
    ("10.0.0.0/8"). A name that leads to an address of a private network is called only if that address is listed too.
    All but loopback is called over https."""
    keys_file: str = ""
    """File with the secrets that sign them, `whsec_` and base64 of 24 to 64 bytes in a line, relative to the topology
    file, of mode 0600. A line `name:whsec_...` is for the API key of that name. Of several, each signs."""
    timeout_s: Seconds = 15.0
    """Seconds that a receiver has to answer."""
    retry_s: Seconds = 5.0
    """Seconds until the second attempt; twice as many until each further one, at most an hour."""
    give_up_s: Seconds = 43_200.0
    """Seconds after the end of a request in which its webhook is tried; at most `[state] keep_requests_s`."""


class HeadSection(Section, frozen=True):
    """`[head]`: the actor that accepts requests and schedules their jobs."""

    host: HostNameOrRule = ""
    """The `[[hosts]]` entry of the machine that runs the head and the API, and that has the journal and the artifacts;
    "" = the only one."""
    port: Port = 5555
    """First bus port; the k-th other component has `port + k`, and after the components come the supervisors of the
    hosts. Unused with `[bus] transport = "ipc"`."""
    dispatch: DispatchName = "round_robin"
    """How an instance is chosen among those with free slots."""
    policy: SchedulingPolicyName = "fifo"
    """Which waiting job goes next: `fifo`, the one that came first; `fair`, of the client (API key) that was served
    least; `shortest_remaining`, the one with the least to compute; `deadline`, the one that is due first, if that can
    still be met. A higher `priority` of a request goes before all of these; see docs/scheduling.md."""
    preempt: bool = True
    """Whether a denoise that runs is parked, with a checkpoint of it, for a job of a higher `priority` that finds no
    free slot. Only where denoisers store checkpoints (`[[roles]] checkpoint_s`)."""
    request_timeout_s: Seconds = 600.0
    """Seconds from acceptance to the result, waiting included."""
    waiting_timeout_s: SecondsOrNone = 0.0
    """Most seconds that a stage may wait for an instance; 0 = no separate bound."""
    running_timeout_s: SecondsOrNone = 0.0
    """Most seconds that a stage may run, with the turns that its instance gives to others; 0 = no separate bound."""
    max_pending: Count = 256
    """Most requests that may be pending; beyond it the API answers 429."""
    max_attempts: Count = 3
    """Attempts of a job before it fails, with the cause of each."""
    metadata: bool = True
    """Whether a file says what it is made from: prompt, seed, parameters and model. The `metadata` of a request goes
    before it; see docs/http-api.md."""


class TransferSection(Section, frozen=True):
    """`[transfer]`: how tensors go from one stage to the next."""

    engine: EngineName = AUTO
    """`shm` shares the memory of one host, `mooncake` moves bytes; `auto` takes shm where all roles run on one host,
    else mooncake. With `[[hosts]]` the roles of one host share memory in any case, and bytes move between hosts."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """Transport of mooncake."""
    trusted_network: bool = False
    """Must be true with mooncake, which authenticates nobody: whoever reaches its ports, on any interface of this host,
    can read and write the pools' memory. Set it only behind a firewall or on a separate network; see
    `docs/security.md`."""
    pool_size: str = "256MiB"
    """Memory of each buffer pool, with a unit: B, KiB, MiB, GiB or TiB. The payload from one stage to the next may be
    as large as the largest power of two within half of it; within a third where a host has encoders and denoisers, and
    others send to it as well."""
    hostname: str = "127.0.0.1"
    """Address by which peers reach this host's mooncake engine; with `[[hosts]]` each has its own."""
    ib_device: str = ""
    """RDMA device; "" = the engine's choice."""
    pull_timeout_s: Seconds = 60.0
    """Most seconds that the bytes of one hop may take with mooncake."""
    preallocated_slots: Natural = 2
    """Blocks that a receiver allocates and offers ahead of time, to save a round trip per transfer."""

    @property
    def pool_bytes(self) -> int:
        """`pool_size` in bytes."""
        return parse_size(self.pool_size)


class MemorySection(Section, frozen=True):
    """`[memory]`: how much memory the weights of all models may take together, on each host.

    With a bound, each model is loaded once at the start, one after the other. If there is no room for all, the least
    recently used models sleep: weights on the CPU are dropped and read again later, weights on a GPU move to the memory
    of the host. A request wakes its model.
    """

    host: str = ""
    """Most bytes of weights of roles on the CPU, with a unit; "" = no bound."""
    card: str = ""
    """Most bytes of weights of roles on each GPU; leave room for what requests need besides."""
    turn_s: Seconds = 30.0
    """Seconds for which a model that has been woken may start requests while another model waits for its room.
    Requests that have started are always finished."""

    @property
    def host_bytes(self) -> int:
        """`host` in bytes, 0 for no bound."""
        return parse_size(self.host) if self.host else 0

    @property
    def card_bytes(self) -> int:
        """`card` in bytes, 0 for no bound."""
        return parse_size(self.card) if self.card else 0


class SupervisionSection(Section, frozen=True):
    """`[supervision]`: what happens when a process exits, in the terms of Erlang/OTP."""

    strategy: Literal["one_for_one", "one_for_all", "rest_for_one"] = "one_for_one"
    """Which components are restarted together with the one that exited."""
    intensity: Natural = 5
    """Restarts of one component within `period_s` before the supervisor gives it up."""
    period_s: Seconds = 30.0
    """Seconds over which `intensity` counts restarts."""
    shutdown_s: Seconds = 10.0
    """Seconds from SIGTERM, which starts the drain, to SIGKILL. A denoise that takes longer is given back with a
    checkpoint of all its steps, where `checkpoint_s` is above 0; else it begins again."""
    heartbeat_timeout_s: Seconds = 15.0
    """Seconds without a heartbeat after which a started process counts as hung, and is killed and restarted."""
    start_timeout_s: Seconds = 600.0
    """The same while a process starts: importing, loading weights and compiling may block it for minutes."""
    host_lost_s: Seconds = 60.0
    """Seconds for which an instance that cannot reach the head goes on with what it has. Then it stops, to free the
    device: if its host was cut off, other instances have those jobs by now."""

    @property
    def heartbeat_s(self) -> float:
        """Seconds between two heartbeats of a process: several fit into the timeout."""
        return min(1.0, self.heartbeat_timeout_s / 4)


class BusSection(Section, frozen=True):
    """`[bus]`: how actors of different processes exchange messages."""

    transport: Literal["ipc", "tcp"] = "ipc"
    """Sockets in a private folder, or loopback TCP, which is encrypted with `keys`. With several `[[hosts]]` it is TCP
    in any case."""
    keys: str = ""
    """File with the secret key of this host, of mode 0600, relative to the topology file; "{host}" in it stands for the
    name of the host; "" = `bus.key` in the state folder. `triptych up` makes it for a system of one machine. With
    several, `triptych keys FILE --host NAME` makes that of each, and `[[hosts]] public_key` lists the public halves."""
    heartbeat_s: Annotated[float, Meta(ge=0, description="a number of seconds, or 0 for the rule")] = 0.0
    """Seconds between two heartbeats of a TCP connection, which is lost after three without an answer; 0 = 0.5 with
    several `[[hosts]]`, where a machine may vanish without a word, else 1."""


class StateSection(Section, frozen=True):
    """`[state]`: what is kept on disk, and for how long."""

    path: str = ""
    """Folder for the journal, the artifacts and the generations, relative to the topology file; "" = under
    `$XDG_STATE_HOME`. The environment variable `TRIPTYCH_STATE_DIR` overrides it."""
    keep_requests_s: Seconds = 86_400.0
    """Seconds for which an ended request, and its Idempotency-Key, is kept."""
    max_requests: Count = 100_000
    """Most ended requests that are kept; the oldest are removed first."""
    max_requests_size: str = "1GiB"
    """Size of the journal, with a unit, beyond which the oldest ended requests are removed."""
    keep_artifacts_s: Seconds = 604_800.0
    """Seconds for which images and videos are kept."""
    max_artifacts: Count = 100_000
    """Most images and videos that are kept; the oldest are removed first, but none of an active request."""
    max_artifacts_size: str = "32GiB"
    """Most bytes of images and videos that are kept, with a unit."""
    keep_uploads_s: Seconds = 3600.0
    """Seconds for which images that clients sent are kept beyond `[head] request_timeout_s`."""
    max_uploads: Count = 100_000
    """Most images of clients that are kept; if active requests may need that many, more are refused."""
    max_uploads_size: str = "16GiB"
    """Most bytes of images of clients that are kept, with a unit."""
    log_size: str = "4MiB"
    """Most bytes that are kept of what each process logs, with a unit, in the folder `logs`, for `triptych logs`; "0" =
    none. stderr has every line as well."""
    timeline: bool = False
    """Whether the head and the roles record when they did what, in the folder `timeline`: at most 64 MiB for each
    component. `python -m triptych.tools.trace` makes a trace of it that Perfetto opens."""


class StoreSection(Section, frozen=True):
    """`[store]`: where the images that clients send, and the results, are kept."""

    url: str = ""
    """A place that all hosts reach and that belongs to this system alone: a folder of a file system that all of them
    mount at the same path, such as "/mnt/shared/triptych" or "file:///mnt/shared/triptych", or "s3://BUCKET/PREFIX",
    which needs `pip install "triptych[s3]"`. "" = the state folder of the head's host; roles on other hosts then send
    and ask for the files over the bus."""

    @property
    def folder(self) -> Path | None:
        """The folder that `url` names; None if it names none."""
        return None if not self.url or self.url.startswith(S3_SCHEME) else Path(self.url.removeprefix("file://"))


class OtelSection(Section, frozen=True):
    """`[otel]`: where the traces of requests go, as OpenTelemetry has them. It needs `pip install "triptych[otel]"`."""

    endpoint: str = ""
    """URL of a receiver of OTLP over HTTP, such as "http://127.0.0.1:4318", without `/v1/traces`; "" = that of the
    environment variable `OTEL_EXPORTER_OTLP_ENDPOINT`; without either there are no traces."""
    sample: Share = 1.0
    """Which share of the requests is traced. A client that sends a `traceparent` decides about its own."""


class RoleSection(Section, frozen=True):
    """One `[[roles]]` entry (with several models `[[models.roles]]`): `count` equal instances of a role."""

    kind: RoleKind
    """The stage that it runs, or `monolithic` for the whole pipeline in one process."""
    host: HostNameOrRule = ""
    """The `[[hosts]]` entry of the machine that runs all its instances; "" = the only one."""
    hosts: HostNames = ()
    """Several machines in place of one `host`: each runs `count` instances."""
    count: Count = 1
    """Number of instances, on each host."""
    device: Device = "cpu"
    """Torch device of every instance: `cpu`, `cuda:N`, or `cuda`: instance k on a host has GPU k modulo the number of
    GPUs there."""
    slots: Count = 2
    """Requests that one instance takes at a time."""
    policy: SchedulingPolicyName = "fifo"
    """Which of the requests that an instance has taken computes its next step: `fifo`, one request after the other;
    `fair`, that of the owner, then the request, that was served least; `shortest_remaining`, the one with the least
    left to compute; `deadline`, the one that is due first. A higher priority goes first under each, and none
    starves."""
    max_batch: Count = 1
    """Most denoising steps, of different requests, that are computed in one call of the model; at most `slots`. 1 =
    each request alone, with the same image as in diffusers, bit for bit. With more, every batch is padded to that
    size, so that the image does not depend on which other requests there are; it may differ in the last bits from that
    of `max_batch = 1`. Only for a denoiser or `monolithic`."""
    cache: str = ""
    """The step cache, with which a step reuses what earlier ones of its request have computed: faster, with another
    image. `first_block`, `magcache`, `taylorseer`, `pab` or `faster`, with parameters after a colon, such as
    "first_block:0.1" or "taylorseer:interval=4,lite=true"; "" = none. Requests turn it off with `cache = false`. Only
    for a denoiser or `monolithic`, and the same for all denoisers of a model. See docs/step-caches.md."""
    checkpoint_s: Annotated[float, Meta(ge=0, description="a number of seconds, or 0 for none")] = 10.0
    """Seconds between two checkpoints of a denoise: what it has made so far, from which another denoiser goes on if
    this one dies. Shorter denoises have none. Checkpoints lie in the pool while it has room for them; 0 = none. Only
    for a denoiser."""
    name: RoleName = ""
    """Instances are called NAME-0, NAME-1, ...; "" = the kind, with several models MODEL-KIND."""
    port: PortOrRule = 0
    """Bus port of the first instance on a host, counting up over `count`; 0 = by the rule at `[head] port`."""
    restart: Literal["permanent", "transient", "temporary"] = "permanent"
    """Restart always, only after an abnormal exit, or never."""
    dtype: Literal["", "float32", "float16", "bfloat16"] = ""
    """Type of the weights and of the computation of this role; "" = that of `[model]`. Payloads of a stage with another
    type are converted."""
    quantization: Literal["none", "int8", "float8"] = "none"
    """Format of the weights of linear layers; `none` = `dtype`, the others need
    `pip install "triptych[quantization]"` and change the image slightly. Autoencoders and vocoders are not
    quantized."""
    offload: Literal["none", "model", "group"] = "none"
    """Which weights stay in the memory of the host, and are on the device only to compute: none, each component as a
    whole (one at a time), or each block or layer (least memory, slowest). The image does not change."""


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "256MiB" or "1.5 GiB"; raises `ValueError` for anything else, and for zero."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is not a size")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size <= 0:
        raise ValueError(f"{text!r} is not more than zero")
    return size


def size_or_none(text: str) -> int:
    """Return the bytes of a size, 0 for "0"; raises `ValueError` as `parse_size` does."""
    return 0 if text.strip() == "0" else parse_size(text)


def parse_rate(text: str) -> tuple[int, float]:
    """Return the count and the seconds of a rate such as "60/min"; raises `ValueError` for anything else."""
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a rate")
    return int(match[1]), _PERIODS[match[2]]


def cache_size(text: str, pool_bytes: int, models: int = 1) -> int:
    """Return the bytes of the prompt cache of one of `models` models; raises `ValueError` as `parse_size` does."""
    if not text:
        return pool_bytes // 4 // models
    return size_or_none(text)


class Sections(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file, decoded and not yet checked for contradictions."""

    models: tuple[ModelSection, ...]
    """From `[model]` and `[[roles]]`, or from `[[models]]`."""
    hosts: tuple[HostSection, ...] = ()
    api: ApiSection = ApiSection()
    webhooks: WebhooksSection = WebhooksSection()
    head: HeadSection = HeadSection()
    transfer: TransferSection = TransferSection()
    memory: MemorySection = MemorySection()
    supervision: SupervisionSection = SupervisionSection()
    bus: BusSection = BusSection()
    state: StateSection = StateSection()
    store: StoreSection = StoreSection()
    otel: OtelSection = OtelSection()
