"""Client to head: submit, wait, query, cancel, delete."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from triptych.bus import Message
from triptych.engines.parameters.schema import Parameter, Task
from triptych.roles.messages.common import Artifact, Input, Name, Natural, Output, Scalar, Seconds, Seed, Value

Key = Annotated[str, Meta(max_length=1024)]
Reason = Annotated[str, Meta(max_length=1024)]


class SubmitRequest(Message):
    """Accept `n` images of one prompt. Asks for RequestAccepted or RequestRejected."""

    request_id: Name
    inputs: dict[str, Input]
    """Pipeline inputs by diffusers' names (`prompt`, `height`, `num_inference_steps`, ...), without the seed."""
    seed: Seed | Annotated[tuple[Seed, ...], Meta(max_length=1024)] | None = None
    """Image k is made from `seed + k`, or from entry k of a list; without a seed the head draws one."""
    n: Natural = 1
    output: Output = Output()
    idempotency_key: Key = ""
    """With a key, submitting again gives the same request; another body under the key is a conflict."""
    owner: Name = ""
    """Name of the API key that it came with; "" without keys. Idempotency keys are each owner's own."""
    model: Name = ""
    """Name of the model; "" for the first."""


class RequestAccepted(Message):
    """The request is on disk: it will reach exactly one terminal state."""

    request_id: Name
    """Not the submitted id when the idempotency key was already known."""
    description_version: Name = ""
    """`ModelDescription.version` of the model as it is described now: a description that a client has kept and that
    has another version is out of date."""


class RequestRejected(Message):
    """The request was not taken; nothing of it is kept."""

    code: str
    """invalid, full, conflict, unavailable or model_not_found."""
    message: str
    """Why, a sentence; where there is a `param` it is the subject, as in "must be 64."."""
    param: str = ""
    """The input at fault, when there is one."""
    retry_after_s: float = 0.0
    description_version: Name = ""
    """As in RequestAccepted; "" where there is no such model."""


class QueryRequest(Message):
    """Asks for the RequestView; refused with `not_found`."""

    request_id: Name
    owner: Name = ""
    """Only a request of this owner is found, with "" anybody's."""


class WaitRequest(Message):
    """Asks for the RequestView once the request is terminal, or as it is after `timeout_s`."""

    request_id: Name
    timeout_s: Seconds
    owner: Name = ""
    """As in QueryRequest."""


class CancelRequest(Message):
    """Stop the request within one denoising step. Asks for the RequestView."""

    request_id: Name
    reason: Reason = "cancelled by the client"
    owner: Name = ""
    """As in QueryRequest."""


class ListRequests(Message):
    """Asks for the RequestList of those that the head knows; refused with `not_found` when `after` is none of them."""

    owner: str = ""
    """As in QueryRequest."""
    after: str = ""
    """The id that the list goes on after; "" from the start."""
    limit: Natural = 20
    newest_first: bool = True


class RequestList(Message):
    """Ids in the order that was asked for; each can be queried."""

    request_ids: tuple[str, ...]
    has_more: bool


class DeleteRequest(Message):
    """Remove a request for good: its rows, its prompt, its artifacts, the uploads that no other needs.

    One that is active is cancelled first. Asks for RequestDeleted; refused with `unavailable` when the disk does not
    let go of it, and then it can be asked for again.
    """

    request_id: Name
    owner: Name = ""
    """As in QueryRequest."""


class RequestDeleted(Message):
    """Nothing of the request is left."""

    existed: bool
    """Whether there was such a request."""


class Transition(Value):
    """One transition of the state machine."""

    state: str
    at: float
    """Unix seconds."""
    reason: str = ""


class JobView(Value):
    """One image of a request."""

    index: int
    seed: int
    state: str
    attempts: int
    step: int
    total_steps: int
    history: tuple[Transition, ...]
    instances: dict[str, str]
    """Stage to the name of the instance that ran it last."""
    stage_seconds: dict[str, float]
    causes: tuple[str, ...]
    """Why earlier attempts ended, oldest first."""
    artifact: Artifact | None = None
    at_fault: bool = False
    """It failed because the pipeline cannot run with its inputs."""


class RequestView(Message):
    """A request as the head sees it."""

    request_id: Name
    state: str
    """The state of the job that is furthest behind; a failed job fails the request once all are terminal."""
    terminal: bool
    created_at: float
    finished_at: float
    """Unix seconds; 0 while active."""
    inputs: dict[str, Input]
    output: Output
    units: tuple[JobView, ...]
    model: str = ""
    """Name of its model."""


class DescribeModel(Message):
    """Asks for the ModelDescription; refused with `model_not_found`."""

    model: str = ""
    """Name of the model; "" for the first."""


class ListModels(Message):
    """Asks for the ModelList."""


class ModelDescription(Message):
    """A served model: what it takes, and the values that it uses when they are not given."""

    name: str
    family: str
    task: str
    """The one that it serves, or "any" of several; "" where that is not known until an instance has loaded it."""
    dtype: str
    created_at: float
    defaults: dict[str, Scalar]
    """Of the serving config."""
    ranges: dict[str, tuple[float, ...]]
    """Number to (minimum, maximum) or (minimum, maximum, multiple of)."""
    parameters: tuple[Parameter, ...]
    """Inputs that the pipeline takes, with the model's defaults; empty until an instance has loaded it."""
    medium: str
    """What it makes: image, video or audio."""
    fps: float
    """Frames per second of its videos where a request asks for no other; 0 where it makes none."""
    tasks: tuple[Task, ...] = ()
    """What requests may be for; empty until an instance has loaded it."""
    state: str = "loaded"
    """starting, loaded, asleep or waking. A request for one that sleeps wakes it."""
    version: Name = ""
    """Digest of every other field but `state` and `created_at`. Equal versions describe the same model, also after a
    restart of the head. RequestAccepted and RequestRejected carry it, so that a client may keep a description and ask
    again only when the version has changed."""


class ModelList(Message):
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
    """jobs that the head may still send."""
    slots: int
    running: tuple[str, ...]
    trouble: str = ""
    """What its work waits for that a person may have to mend, such as a full disk; a sentence."""
    awake: bool = True
    """Whether its weights are in memory."""
    weights: int = 0
    """Bytes of its weights; 0 where it has never loaded them."""


class PromptCacheView(Value):
    """What encoders made and is kept for requests of the same prompt."""

    entries: int = 0
    """Blocks that it holds."""
    nbytes: int = 0
    """What they take in their pool."""
    capacity: int = 0
    """Most bytes that they may take; 0 when it is off."""
    hits: int = 0
    """Units that needed no encoder."""
    misses: int = 0
    """Units sent to one."""


class ClusterView(Message):
    """Jobs, instances and the prompt cache as the head knows them."""

    ready: bool
    reasons: tuple[str, ...]
    """Why it is not ready, in words; empty when it is."""
    instances: tuple[InstanceView, ...]
    states: dict[str, int]
    """Units by state."""
    completed: int
    average_latency_s: float
    """Of completed jobs alone."""
    prompt_cache: PromptCacheView = PromptCacheView()
    models: dict[str, str] = msgspec.field(default_factory=dict)
    """What each model does, by name: starting, loaded, asleep or waking."""
