"""Messages between the head and instances: registration, credits, stages, transfers.

The envelope has the sender of a message and its incarnation.
"""

from __future__ import annotations

from typing import Final

from triptych.bus import Generation, Message
from triptych.engines.parameters.schema import Signature
from triptych.engines.stages import Stage
from triptych.roles.messages.common import (
    Artifact,
    Attempt,
    Input,
    LeaseRef,
    Name,
    Natural,
    Output,
    Provenance,
    Rebind,
    SchedulingHints,
    Seconds,
    Seed,
    StoredPayload,
)

HEAD_ANSWER_S: Final = 5.0
"""Seconds that an instance waits for the head. A head decides without computing; one that is busy with its journal is
asked again, and nothing is lost."""
INSTANCE_ANSWER_S: Final = 5.0
"""Seconds that the head waits for an instance, which answers without computing. One whose event loop stalls for longer
is asked again, and nothing is lost."""


class Hello(Message):
    """Say what an instance runs, before it registers. Asks for Acknowledged; refused with `other_release`.

    Its fields are those of every later version, so that two versions understand each other as far as this.
    """

    version: Name
    """Version of Triptych."""
    topology: Name
    """Digest of what the head must have read alike, of `actors.topology.agreement`."""
    host: Name = ""
    """The `[[hosts]]` entry that it runs on; "" without any."""


class RegisterInstance(Message):
    """Register an instance; sent again to each new head. Asks for InstanceRegistered."""

    name: Name
    kind: Name
    """encoder, denoiser, decoder or monolithic."""
    generation: Generation
    pid: Natural
    slots: Natural
    issued: Natural
    """Credits issued by this incarnation so far; never decreases."""
    taken: Natural
    """Attempts taken by this incarnation so far."""
    pool: Name
    """The buffer pool that it maps; "" for monolithic."""
    signature: Signature
    """The parameters and outputs of the loaded pipeline."""
    running: tuple[Attempt, ...]
    """Assigned attempts, so that a restarted head need not repeat them."""
    leaving: bool = False
    """Whether it has been asked to end, so that it takes no more attempts."""
    model: Name = ""
    """Version of the weights that it has loaded, or would load, of `engines.weights.model_version`."""
    awake: bool = True
    """Whether its weights are in memory."""
    device: Name = "cpu"
    """Torch device, a GPU with its number."""
    weights: Natural = 0
    """Bytes of its weights on that device; 0 until it has loaded them once."""
    max_batch: Natural = 1
    """Most jobs whose denoising steps it computes in one call: the bucket of jobs that it denoises first."""
    stores_checkpoints: bool = False
    """Whether another instance can go on with a denoise that it gives back."""


class InstanceWakeChanged(Message):
    """An instance has woken, has gone to sleep, or failed to wake. Asks for Acknowledged."""

    awake: bool
    signature: Signature
    weights: Natural
    seconds: Seconds
    """Duration of the change."""
    trouble: str = ""
    """Why it could not be woken; a sentence."""


class Sleep(Message):
    """Release the weights. Asks for Acknowledged; refused with `busy` while attempts are assigned."""


class Wake(Message):
    """Load the weights again. Asks for Acknowledged; InstanceWakeChanged follows at the end."""


class InstanceRegistered(Message):
    """The head has registered the instance, which must drop the attempts in `unknown`."""

    unknown: tuple[Attempt, ...] = ()


class InstanceHeartbeat(Message):
    """Sent every `heartbeat_s`. Asks for Acknowledged; refused with `fenced` once the head has fenced it."""

    trouble: str = ""
    """A problem that attempts wait for and that an operator may have to solve, such as a full disk; a sentence."""


class InstanceStopping(Message):
    """This incarnation has been asked to end, and takes no more attempts. Asks for Acknowledged."""


class StageAssign(Message):
    """Run the first stage of a job (all stages, on a monolithic instance). Asks for StageTaken."""

    attempt: Attempt
    inputs: dict[str, Input]
    seed: Seed
    output: Output
    left_s: Seconds
    """Seconds after which the result is of no use."""
    hints: SchedulingHints = SchedulingHints()
    model: str = ""
    """Name of the model for clients."""
    accepted_at: float = 0.0
    """When the request was accepted, in unix seconds: one that was deleted may have had the same id."""


class TransferAlloc(Message):
    """Reserve a block in the instance's pool. Asks for TransferAllocated or TransferRejected."""

    attempt: Attempt
    nbytes: Natural


class TransferAllocated(Message):
    """The block is reserved for this attempt."""

    attempt: Attempt
    target: LeaseRef


class TransferRejected(Message):
    """The instance has no block for this attempt."""

    attempt: Attempt
    reason: str
    retryable: bool


class BlocksOffered(Message):
    """Preallocated blocks of the instance's pool, which need no TransferAlloc. Sent at each change."""

    blocks: tuple[LeaseRef, ...]
    """All of them; replaces those offered before."""


class TransferPush(Message):
    """Fetch a job's stored tensors and run the instance's stage on them. Asks for StageTaken."""

    attempt: Attempt
    source: StoredPayload
    target: LeaseRef | None
    """Block for the bytes; None when the source is in the instance's pool, which it maps."""
    output: Output
    left_s: Seconds
    """Seconds after which the result is of no use."""
    rebind: Rebind | None = None
    """Set when the tensors were stored for another job of an equal prompt."""
    hints: SchedulingHints = SchedulingHints()
    partial_images: Natural = 0
    """Most previews that a denoiser stores on its way."""
    checkpoint: StoredPayload | None = None
    """What an earlier attempt at the stage has made so far, in the instance's pool; None to start from `source`."""
    provenance: Provenance | None = None
    """For a decoder, unless the file is to have no metadata."""
    accepted_at: float = 0.0
    """When the request was accepted, in unix seconds: one that was deleted may have had the same id."""


class AttemptQuery(Message):
    """Ask an instance which of these attempts it has. Asks for AttemptsAssigned."""

    attempts: tuple[Attempt, ...]


class AttemptsAssigned(Message):
    """Those of the queried attempts that the instance has, or has reserved a block for."""

    attempts: tuple[Attempt, ...]


class StageTaken(Message):
    """The instance has taken the attempt; one credit is spent."""

    attempt: Attempt


class StageCancel(Message):
    """Stop this attempt within one step, if the instance still has it."""

    attempt: Attempt
    reason: str


class StagePark(Message):
    """Give this denoise back for a more urgent job: store a checkpoint of it, then report StageReturned.

    If it ends first, its outputs count. If no checkpoint of it can be stored, it goes on.
    """

    attempt: Attempt


class Acknowledged(Message):
    """The receiver has acted on the message, which need not be sent again."""


class TransferFailed(Message):
    """The stored tensors could not be fetched, so the stage did not run."""

    attempt: Attempt
    reason: str
    source_gone: bool
    """Whether the source is lost or damaged, so that another instance would fail as well."""
    issued: Natural


class StageStarted(Message):
    """The stage is about to run. Sent without an answer: an instance says it again to a head that it registers with."""

    attempt: Attempt
    stage: Stage
    waited_s: Seconds = 0.0
    """Seconds that the instance had its inputs and did not compute it, because of others."""


class StageProgress(Message):
    """A denoising step has finished. Sent without an answer: the next one replaces a lost one."""

    attempt: Attempt
    step: Natural
    total_steps: Natural


class PreviewStored(Message):
    """What a denoise is after one of its steps is sealed in a block, for a decoder. Asks for Acknowledged."""

    preview: Attempt
    """Of `roles.previews.preview_attempt`."""
    stored: StoredPayload


class CheckpointStored(Message):
    """What a denoise has made so far is sealed in a block, from which another attempt can go on. The stage goes on."""

    attempt: Attempt
    step: Natural
    """Steps that are done in it."""
    stored: StoredPayload


class StageOutputsStored(Message):
    """The stage is done and its outputs are sealed in a block."""

    attempt: Attempt
    stage: Stage
    stored: StoredPayload
    seconds: Seconds
    issued: Natural
    seed_independent: bool = False
    """Whether the outputs of an encoder are the same for every seed, except for the generator."""


class StageFinished(Message):
    """The last stage is done and the artifact is on disk."""

    attempt: Attempt
    stage: Stage
    artifact: Artifact
    seconds: Seconds
    issued: Natural


class StageFailed(Message):
    """The stage raised."""

    attempt: Attempt
    stage: Stage | None
    """None where no stage had begun."""
    error: str
    retryable: bool
    """False when it would fail on every instance."""
    issued: Natural
    invalid_request: bool = False
    """Whether the request is at fault: the pipeline cannot run with one of its values."""


class StageReturned(Message):
    """The instance returns an attempt that it cannot finish before it ends, or that it was told to park."""

    attempt: Attempt
    issued: Natural


class StageCancelled(Message):
    """The attempt was cancelled as the head had asked."""

    attempt: Attempt
    issued: Natural
