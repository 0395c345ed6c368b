"""Client to head: submit, wait, query, cancel, delete."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from triptych.bus import Message
from triptych.engines.parameters.schema import Parameter, Task
from triptych.roles.messages.common import (
    MAX_PARTIAL_IMAGES,
    Artifact,
    Input,
    Name,
    Natural,
    Output,
    Priority,
    Scalar,
    Seconds,
    Seed,
    Value,
)
from triptych.roles.messages.webhooks import WebhookUrl

Key = Annotated[str, Meta(max_length=1024)]
Reason = Annotated[str, Meta(max_length=1024)]


class SubmitRequest(Message):
    """Submit a request for `n` images or videos. Asks for RequestAccepted or RequestRejected."""

    request_id: Name
    inputs: dict[str, Input]
    """Pipeline inputs by diffusers' names (`prompt`, `height`, `num_inference_steps`, ...), without the seed."""
    seed: Seed | Annotated[tuple[Seed, ...], Meta(max_length=1024)] | None = None
    """Image k is made from `seed + k`, or from entry k of a list; without a seed the head draws one."""
    n: Natural = 1
    output: Output = Output()
    idempotency_key: Key = ""
    """With a key, submitting again returns the same request; another body under the key is a conflict."""
    owner: Name = ""
    """Name of the client's API key; "" without keys. Each owner has its own idempotency keys."""
    model: Name = ""
    """Name of the model; "" for the first."""
    priority: Priority = 0
    """A higher one goes first."""
    deadline_s: Seconds = 0.0
    """Seconds from acceptance in which the client wants the result; 0 without a deadline. It orders jobs, ends none."""
    partial_images: Annotated[int, Meta(ge=0, le=MAX_PARTIAL_IMAGES)] = 0
    """Most previews of each image while it is denoised."""
    remixed_from: Name = ""
    """Id of the request whose inputs it has, with another prompt; "" for none."""
    wants_view: bool = False
    """Whether RequestAccepted is to have the view."""
    webhook_url: WebhookUrl = ""
    """Called once the request has ended; "" for none."""


class RequestAccepted(Message):
    """The request is on disk, and will reach exactly one terminal state."""

    request_id: Name
    """Not the submitted id when the idempotency key was already known."""
    description_version: Name = ""
    """`ModelDescription.version` of the model at present; a description with another version is out of date."""
    view: RequestView | None = None
    """The request as it is now, if SubmitRequest asked for it."""


class RequestRejected(Message):
    """The request was rejected, and not stored."""

    code: str
    """invalid, full, conflict, unavailable or model_not_found."""
    message: str
    """Why, as a sentence; if there is a `param`, that is its subject, as in "must be 64."."""
    param: str = ""
    """The input at fault, or ""."""
    retry_after_s: float = 0.0
    description_version: Name = ""
    """As in RequestAccepted; "" where there is no such model."""


class QueryRequest(Message):
    """Asks for the RequestView; refused with `not_found`."""

    request_id: Name
    owner: Name = ""
    """Find only requests of this owner; "" for every owner."""


class WaitRequest(Message):
    """Asks for the RequestView as soon as the request is terminal, at the latest after `timeout_s`."""

    request_id: Name
    timeout_s: Seconds
    owner: Name = ""
    """As in QueryRequest."""
    revision: Name = ""
    """Answer as soon as the view has another revision, too; "" to wait for the end alone. With a revision, the view of
    an active request has no inputs and no runs."""


class CancelRequest(Message):
    """Stop the request within one denoising step. Asks for the RequestView."""

    request_id: Name
    reason: Reason = "cancelled by the client"
    owner: Name = ""
    """As in QueryRequest."""


class ListRequests(Message):
    """Asks for the RequestList; refused with `not_found` when the owner has no request `after`."""

    owner: str = ""
    """As in QueryRequest."""
    after: str = ""
    """The list starts after this id; "" for the first page."""
    limit: Annotated[int, Meta(ge=0, le=1000)] = 20
    newest_first: bool = True
    active: bool | None = None
    """Only those that have not ended, or only those that have; None for both."""
    output_format: Name = ""
    """Only those whose `Output.format` this is; "" for all."""


class RequestList(Message):
    """A page of request ids in the requested order; each can be queried."""

    request_ids: tuple[str, ...]
    has_more: bool


class DeleteRequest(Message):
    """Delete a request: its rows, its prompt, its artifacts, and the uploads that no other request needs.

    An active request is cancelled first. Asks for RequestDeleted; refused with `unavailable` when the disk fails, and
    can then be repeated.
    """

    request_id: Name
    owner: Name = ""
    """As in QueryRequest."""


class RequestDeleted(Message):
    """The request is deleted."""

    existed: bool
    """Whether there was such a request."""


class Transition(Value):
    """One transition of the state machine."""

    state: str
    at: float
    """Unix seconds."""
    reason: str = ""


class StepMark(Value):
    """A denoising step that has ended."""

    step: int
    at: float
    """Unix seconds."""


class RunView(Value):
    """One run: a stage of an attempt on an instance. Times are Unix seconds by the head's clock, 0 before they come."""

    stage: str
    instance: str
    attempt: int
    assigned_at: float
    """When the job left the queue of the stage."""
    loaded_at: float = 0.0
    """When the instance had its inputs."""
    started_at: float = 0.0
    """When it began to compute."""
    computed_at: float = 0.0
    """When it had computed; the outputs were stored, or the artifact written, from then on."""
    ended_at: float = 0.0
    reason: str = ""
    """Why it came to nothing; "" if it did not."""
    steps: tuple[StepMark, ...] = ()
    """Of a denoise, oldest first; of many steps, some at equal distances."""


class PreviewView(Value):
    """What a job would have been after one of its steps."""

    step: int
    artifact: Artifact


class JobView(Value):
    """One image or video of a request."""

    index: int
    seed: int
    state: str
    attempts: int
    step: int
    total_steps: int
    history: tuple[Transition, ...]
    """Oldest first; of very many, the first and the last."""
    instances: dict[str, str]
    """Stage to the name of the instance that ran it last."""
    stage_seconds: dict[str, float]
    causes: tuple[str, ...]
    """Why earlier attempts ended, oldest first; of very many, the first and the last."""
    artifact: Artifact | None = None
    at_fault: bool = False
    """Whether it failed because the pipeline cannot run with its inputs."""
    bucket: int = 0
    """Rows of each batch that its denoise is computed in, 1 = alone; 0 before its first denoise."""
    previews: tuple[PreviewView, ...] = ()
    """Its partial images so far, by step."""
    checkpoint_step: int = 0
    """Steps in the checkpoint from which its denoise would go on; 0 without one."""
    resumed_from: int = 0
    """Step of the checkpoint from which its last denoise went on; 0 if it began at the beginning."""
    steps_redone: int = 0
    """Steps that were computed again because an instance was lost."""
    parked: int = 0
    """How often its denoise was given back for a job of a higher priority."""
    runs: tuple[RunView, ...] = ()
    """Every try of an instance at one of its stages, with its times, oldest first; the newest `MAX_RUNS`."""


class RequestView(Message):
    """A request as the head sees it."""

    request_id: Name
    state: str
    """State of the least advanced job; once all are terminal, the worst outcome."""
    terminal: bool
    created_at: float
    finished_at: float
    """Unix seconds; 0 while active."""
    inputs: dict[str, Input]
    output: Output
    units: tuple[JobView, ...]
    model: str = ""
    """Name of its model."""
    priority: int = 0
    deadline_s: float | None = None
    """As submitted; None without one."""
    deadline_met: bool | None = None
    """Whether it was done by its deadline; None without one, or while that is open."""
    revision: Name = ""
    """Changes with each move, step and preview of its jobs."""
    remixed_from: Name = ""
    """As submitted."""
    webhook_url: str = ""
    """Called once it has ended; "" for none."""


class DescribeModel(Message):
    """Asks for the ModelDescription; refused with `model_not_found`."""

    model: str = ""
    """Name of the model; "" for the first."""


class ListModels(Message):
    """Asks for the ModelDescriptions."""


class ModelDescription(Message):
    """A served model: its parameters with their defaults, and its outputs."""

    name: str
    family: str
    task: str
    """The task that it serves, "any" for several; "" while unknown because no instance has loaded it."""
    dtype: str
    created_at: float
    defaults: dict[str, Scalar]
    """Defaults of the serving config."""
    ranges: dict[str, tuple[float, ...]]
    """Number to (minimum, maximum) or (minimum, maximum, multiple of)."""
    parameters: tuple[Parameter, ...]
    """Inputs that the pipeline takes, with the model's defaults; empty until an instance has loaded it."""
    medium: str
    """Medium of its outputs: image, video or audio."""
    fps: float
    """Default frames per second of its videos; 0 for other media."""
    tasks: tuple[Task, ...] = ()
    """Tasks of requests; empty until an instance has loaded it."""
    state: str = "loaded"
    """starting, loaded, asleep or waking. A request wakes a model that is asleep."""
    version: Name = ""
    """Digest of every other field but `state` and `created_at`. Equal versions describe the same model, also after a
    restart of the head. RequestAccepted and RequestRejected have it, so that a client may cache a description until
    the version changes."""


class ModelDescriptions(Message):
    """All models, in the order of the topology."""

    models: tuple[ModelDescription, ...]


class ClusterQuery(Message):
    """Asks for the ClusterView."""


class InstanceView(Value):
    """A role instance as the head knows it."""

    name: str
    kind: str
    generation: int
    credits: int
    """Jobs that the head may still send."""
    slots: int
    running: tuple[str, ...]
    trouble: str = ""
    """A problem that its work waits for and that an operator may have to solve, such as a full disk; a sentence."""
    awake: bool = True
    """Whether its weights are in memory."""
    weights: int = 0
    """Bytes of its weights; 0 until it has loaded them once."""


class PromptCacheView(Value):
    """The cache of encoder outputs for requests with the same prompt."""

    entries: int = 0
    """Number of its blocks."""
    nbytes: int = 0
    """Bytes of the pool that they take."""
    capacity: int = 0
    """Most bytes that they may take; 0 when the cache is off."""
    hits: int = 0
    """Jobs that needed no encoder."""
    misses: int = 0
    """Jobs sent to an encoder."""


class ClusterView(Message):
    """The jobs, instances, models and prompt caches of the cluster."""

    ready: bool
    reasons: tuple[str, ...]
    """Why it is not ready, a sentence each; empty when it is."""
    instances: tuple[InstanceView, ...]
    states: dict[str, int]
    """Number of active jobs by state."""
    completed: int
    average_latency_s: float
    """Average over completed jobs only."""
    prompt_cache: PromptCacheView = PromptCacheView()
    models: dict[str, str] = msgspec.field(default_factory=dict)
    """State of each model by name: starting, loaded, asleep or waking."""
