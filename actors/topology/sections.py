"""The sections of a topology file, as typed structs. The defaults here are the documentation of each key."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from triptych.engines.backends import AUTO, BACKENDS
from triptych.roles.head.dispatch import POLICIES

RoleKind = Literal["encoder", "denoiser", "decoder", "monolithic"]
STAGES: Final = ("encoder", "denoiser", "decoder")

# A description says, for the reader of an error, what a value should be.
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
OptionValue = bool | int | float | str | tuple[int | float, ...]
Options = Annotated[
    dict[str, OptionValue],
    Meta(description="a table whose values are texts, numbers, true or false, or lists of numbers"),
]
Dtype = Literal["float32", "float16", "bfloat16"]
if TYPE_CHECKING:
    EngineName: TypeAlias = str
    DispatchName: TypeAlias = str
else:  # Literals, so that an error lists the choices
    EngineName = Literal[(AUTO, *BACKENDS)]
    DispatchName = Literal[tuple(POLICIES)]

Hosts = Annotated[tuple[str, ...], Meta(description='a list of host names, such as ["pictures.example.com"]')]

LEAST_POOL_BYTES: Final = 8192
"""Two pages: one for what a stage takes in, one for what it makes."""
_UNITS: Final = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZE: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
_RATE: Final = re.compile(r"([1-9][0-9]{0,8})/(s|min|h|day)")
_PERIODS: Final = {"s": 1.0, "min": 60.0, "h": 3600.0, "day": 86_400.0}


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One table of the file; every key has a default unless the table makes no sense without it."""

    earlier_names: ClassVar[Mapping[str, str]] = {}
    """Keys by the name that they had in an earlier version, which is still read, with a warning."""


class LoraSection(Section, frozen=True):
    """One `[[model.lora]]` entry: an adapter that requests may ask for by name, one at a time."""

    name: LoraName
    """What requests give as `lora`."""
    path: str
    """A `.safetensors` file, or a folder with exactly one, relative to the topology file."""
    scale: Scale = 1.0
    """How strong it is in requests that give no `lora_scale`."""
    path_2: str = ""
    """The same for `transformer_2`, where an adapter of a model with two transformers (Wan 2.2) comes as two files;
    "" = there is no second file."""


class EmbeddingSection(Section, frozen=True):
    """One `[[model.embeddings]]` entry: a word that the model is taught (textual inversion)."""

    token: Token
    """The word, as prompts have it."""
    path: str
    """A `.safetensors` file with its vectors, relative to the topology file."""


class ModelSection(Section, frozen=True):
    """`[model]`: what is served; or one `[[models]]` entry, where it is more than one model."""

    path: str
    """What is served, relative to the topology file: the folder of a model in the layout of diffusers; a checkpoint in
    one file (`.safetensors` or `.gguf`), with `config`; or the id of a repository, such as "stabilityai/sdxl-turbo",
    that is in the local cache of the hub. Nothing is ever fetched. `Model.path` is the absolute folder."""
    revision: str = ""
    """Branch, tag or commit of that repository; "" = its main branch."""
    config: str = ""
    """With a checkpoint: the folder, or the id of a repository, with the configurations and tokenizers of a model of
    the same kind. It needs no weights but of components that the checkpoint has not."""
    components: Components = {}
    """`[model.components]`: in place of the model's own, by the name of a component, a `.safetensors` or `.gguf` file
    with its weights, or a folder with its weights and its configuration."""
    name: ModelName = ""
    """What requests give as `model`, which each `[[models]]` entry has to say; "" = the name in the model's serving
    config, else that of its folder."""
    dtype: Dtype = "bfloat16"
    """Type of the weights and of the computation."""
    task: str | tuple[str, ...] = ""
    """Such as `text2image`; or a list of tasks, or `any` for all that the folder can do: then the inputs of a request
    tell which it is for, and all the weights for that are loaded; "" = that of the model's serving config, else what
    the class that its index names does. See docs/models.md."""
    route: Literal["", "modular", "classic"] = ""
    """`modular` runs the blocks that diffusers has of a pipeline, `classic` the class that the model's index names;
    "" = the blocks where they can do what the class does, else the class. See docs/models.md."""
    variant: Variant = ""
    """Which of the weight files of a component are read where there are several, such as "fp16"; "" = the plain ones,
    else the only variant that there is. A component that has only plain files is read from those."""
    trust_remote_code: bool = False
    """Run the Python code that comes with the model, where its pipeline or a component is of its own: with all that the
    user of these processes may do. Read it first; see docs/security.md."""
    prompt_cache: str = ""
    """Memory in the encoders' pool for what they made, kept for requests of the same prompt: "" = a quarter of
    `[transfer] pool_size`, shared out among the models, "0" = none, else a size; together they take at most half of it.
    Without encoders there is none."""
    scheduler: Options = {}
    """Table `[model.scheduler]`: the scheduler of requests that choose none. `class` is the name of its class, such as
    `DPMSolverMultistepScheduler`; the other keys are what it has otherwise than the model's own, such as
    `use_karras_sigmas = true`. `/v1/models` lists the classes that a model can use, and what they take."""
    guider: Options = {}
    """Table `[model.guider]`: likewise the guider, of a model that has one, such as
    `class = "AdaptiveProjectedGuidance"`."""
    vae_tiling: bool = False
    """Whether the VAE computes in tiles, which takes less memory; the image is another one, a little."""
    vae_tiling_options: Options = {}
    """Sizes of the tiles, where the VAE can be told of some, such as `tile_sample_min_height = 256`."""
    vae_slicing: bool = False
    """Whether the VAE computes one image of a batch at a time."""
    sleep: Literal["auto", "never"] = "auto"
    """Whether its weights may leave the memory while others need the room; see `MemorySection`."""
    lora: tuple[LoraSection, ...] = ()
    """Adapters, each loaded by every instance when it starts; see `LoraSection`."""
    embeddings: tuple[EmbeddingSection, ...] = ()
    """Words that the model is taught; see `EmbeddingSection`."""
    roles: tuple[RoleSection, ...] = ()
    """The processes that serve it; see `RoleSection`. Those of `[model]` are written `[[roles]]`."""


class ApiSection(Section, frozen=True):
    """`[api]`: the HTTP face."""

    host: str = "127.0.0.1"
    """Address to listen on; without `keys_file` only a loopback address is taken."""
    port: Port = 8000
    """TCP port of HTTP."""
    public_url: str = ""
    """Where clients reach the API, such as "https://pictures.example.com" behind a proxy: what the URLs in answers
    start with; "" = what the client asked for."""
    allowed_hosts: Hosts = ()
    """Names under which clients may reach the API, besides loopback, `host` and the one of `public_url`; also the
    sites whose pages may call it."""
    keys_file: str = ""
    """File with a line `name:key` for each client, relative to the topology file, of mode 0600. Then each request
    has to come with one of the keys, and sees what was made with a key of the same name; "" = no keys."""
    rate_limit: str = ""
    """Most requests that one key (without keys: all clients together) may begin, such as "60/min"; the units are s,
    min, h and day; "" = no limit."""
    max_connections: Count = 1024
    """Connections that may be open at a time; any more are answered 503."""


class HeadSection(Section, frozen=True):
    """`[head]`: the actor that accepts requests and hands out work."""

    port: Port = 5555
    """First bus port; the k-th other component has `port + k`. Unused with `[bus] transport = "ipc"`."""
    dispatch: DispatchName = "round_robin"
    """How an instance is chosen among those with a free slot."""
    request_timeout_s: Seconds = 600.0
    """Seconds from acceptance to the result, waiting included."""
    waiting_timeout_s: SecondsOrNone = 0.0
    """Most seconds that a stage may wait for an instance, 0 = no bound of its own."""
    running_timeout_s: SecondsOrNone = 0.0
    """Most seconds that a stage may run, 0 = no bound of its own."""
    max_pending: Count = 256
    """Requests that may wait; beyond it the API answers 429."""
    max_attempts: Count = 3
    """Times that a request may be started before it fails with every cause."""


class TransferSection(Section, frozen=True):
    """`[transfer]`: how tensors get from one stage to the next."""

    engine: EngineName = AUTO
    """`shm` shares the memory of one host, `mooncake` moves bytes, `auto` takes shm on one host."""
    protocol: Literal["tcp", "rdma"] = "tcp"
    """Transport of mooncake."""
    trusted_network: bool = False
    """Must be true with mooncake, which asks nobody who they are: whoever reaches its ports, on any interface of this
    host, reads and writes the pools' memory. Say so only where a firewall or a network of its own keeps others away;
    see `docs/security.md`."""
    pool_size: str = "256MiB"
    """Memory of each buffer pool, with a unit: B, KiB, MiB, GiB or TiB. What one stage hands to the next may take up to
    the largest power of two within half of it."""
    hostname: str = "127.0.0.1"
    """Address by which peers reach this host's mooncake engine."""
    ib_device: str = ""
    """RDMA device, "" for the engine's own choice."""
    pull_timeout_s: Seconds = 60.0
    """Most seconds that the bytes of one hop may take with mooncake."""
    preallocated_slots: Natural = 2
    """Slots that a receiver advertises ahead of time, to save the allocation's round trip."""

    @property
    def pool_bytes(self) -> int:
        """`pool_size` in bytes."""
        return parse_size(self.pool_size)

    @property
    def largest_payload(self) -> int:
        """Most bytes that one stage may hand to the next: a block of a pool is a power of two, within half of it."""
        return 1 << (self.pool_bytes // 2).bit_length() >> 1


class MemorySection(Section, frozen=True):
    """`[memory]`: how much the weights of all models may take together.

    With a bound, each model is loaded once at the start, in turn, and then the least recently used ones sleep where
    there is no room for all: on the CPU their weights are dropped and read again, from a GPU they go to the memory of
    the host. A request wakes its model.
    """

    host: str = ""
    """Most bytes of weights of roles on the CPU, with a unit; "" = no bound."""
    card: str = ""
    """The same of roles on each GPU; leave room for what requests need besides."""
    turn_s: Seconds = 30.0
    """Seconds for which a model that has been woken goes on to begin requests while another model waits for its room.
    What it has begun is always finished."""

    @property
    def host_bytes(self) -> int:
        """`host` in bytes, 0 for no bound."""
        return parse_size(self.host) if self.host else 0

    @property
    def card_bytes(self) -> int:
        """`card` in bytes, 0 for no bound."""
        return parse_size(self.card) if self.card else 0


class SupervisionSection(Section, frozen=True):
    """`[supervision]`: what happens when a process ends."""

    strategy: Literal["one_for_one", "one_for_all", "rest_for_one"] = "one_for_one"
    """Who is restarted together with the one that ended."""
    intensity: Natural = 5
    """Restarts of one component within `period_s` before the supervisor gives up on it."""
    period_s: Seconds = 30.0
    """The window of `intensity`."""
    shutdown_s: Seconds = 10.0
    """Seconds to drain after SIGTERM before SIGKILL. A denoise that takes longer is done again from its start: where
    that costs minutes of a GPU, give the time of one denoise."""
    heartbeat_timeout_s: Seconds = 15.0
    """Silence after which a process that has started counts as hung, and is killed and restarted."""
    start_timeout_s: Seconds = 600.0
    """The same while a process starts: importing, loading weights and compiling may keep it silent for minutes."""

    @property
    def heartbeat_s(self) -> float:
        """Seconds between two heartbeats of a process: several fit into the timeout."""
        return min(1.0, self.heartbeat_timeout_s / 4)


class BusSection(Section, frozen=True):
    """`[bus]`: how actors of different processes talk."""

    transport: Literal["ipc", "tcp"] = "ipc"
    """Sockets in a private folder, or loopback TCP with CURVE: `triptych up` makes a key in the state folder, and only
    processes that can read it get in."""


class StateSection(Section, frozen=True):
    """`[state]`: what outlives the processes."""

    path: str = ""
    """Folder for the journal, the artifacts and the generations, relative to the topology file; "" = under
    `$XDG_STATE_HOME`. The environment's `TRIPTYCH_STATE_DIR` goes before it."""
    keep_requests_s: Seconds = 86_400.0
    """Seconds for which an ended request can be asked about, and its Idempotency-Key counts."""
    max_requests: Count = 100_000
    """Ended requests that are kept; the oldest go first."""
    max_requests_size: str = "1GiB"
    """Size of the journal beyond which the oldest ended requests go, with a unit."""
    keep_artifacts_s: Seconds = 604_800.0
    """Seconds for which images and videos are kept."""
    max_artifacts: Count = 100_000
    """Pictures and videos that are kept; the oldest go first, but none of a request that is still to be answered."""
    max_artifacts_size: str = "32GiB"
    """Bytes of images and videos that are kept, with a unit."""
    keep_uploads_s: Seconds = 3600.0
    """Seconds for which images that clients sent are kept beyond `[head] request_timeout_s`."""
    max_uploads: Count = 100_000
    """Pictures of clients that are kept. Where those that a request may still need are as many, more are refused."""
    max_uploads_size: str = "16GiB"
    """Bytes of images of clients that are kept, with a unit."""


class RoleSection(Section, frozen=True):
    """One `[[roles]]` entry, with several models a `[[models.roles]]` entry: `count` equal instances of a stage."""

    kind: RoleKind
    """The stage, or `monolithic` for the whole pipeline in one process."""
    count: Count = 1
    """Number of instances."""
    device: Device = "cpu"
    """Torch device of every instance: `cpu`, `cuda:N`, or `cuda`: then instance k has GPU k modulo the GPUs there."""
    slots: Count = 2
    """Requests that one instance takes at a time."""
    name: RoleName = ""
    """Instances are called NAME-0, NAME-1, ...; "" = the kind, with several models MODEL-KIND."""
    port: PortOrRule = 0
    """Bus port of the first instance, counting up over `count`; 0 = by the rule at `[head] port`."""
    restart: Literal["permanent", "transient", "temporary"] = "permanent"
    """Restart always, only after an abnormal end, or never."""
    dtype: Literal["", "float32", "float16", "bfloat16"] = ""
    """Type of the weights and of the computation here; "" = that of `[model]`. What comes from a stage with another
    one is converted."""
    quantization: Literal["none", "int8", "float8"] = "none"
    """What the weights of linear layers are held as, with `none` as `dtype`; the others need
    `pip install "triptych[quantization]"`. Autoencoders and vocoders stay as they are. The image is another one,
    a little."""
    offload: Literal["none", "model", "group"] = "none"
    """What rests in the memory of the host and is on the device just to compute: nothing, each component as a whole
    (one at a time), or each block or layer (least memory, slowest). The image stays the same."""


def parse_size(text: str) -> int:
    """Bytes of a size such as "256MiB" or "1.5 GiB"; raises `ValueError` for anything else, and for zero."""
    match = _SIZE.fullmatch(text)
    if match is None or match[2] not in _UNITS:
        raise ValueError(f"{text!r} is no size")
    size = int(float(match[1]) * _UNITS[match[2]])
    if size <= 0:
        raise ValueError(f"{text!r} is not more than zero")
    return size


def parse_rate(text: str) -> tuple[int, float]:
    """Count and seconds of a rate such as "60/min"; raises `ValueError` for anything else."""
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no rate")
    return int(match[1]), _PERIODS[match[2]]


def cache_size(text: str, pool_bytes: int, models: int = 1) -> int:
    """Bytes of the prompt cache of one of `models` models; raises `ValueError` as `parse_size` does."""
    if not text:
        return pool_bytes // 4 // models
    return 0 if text.strip() == "0" else parse_size(text)


class Sections(msgspec.Struct, frozen=True, kw_only=True):
    """The whole file, decoded but not yet checked against itself."""

    models: tuple[ModelSection, ...]
    """Of `[model]` and `[[roles]]`, or of `[[models]]`."""
    api: ApiSection = ApiSection()
    head: HeadSection = HeadSection()
    transfer: TransferSection = TransferSection()
    memory: MemorySection = MemorySection()
    supervision: SupervisionSection = SupervisionSection()
    bus: BusSection = BusSection()
    state: StateSection = StateSection()
