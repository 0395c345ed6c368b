"""Head to role instance and back: registration, credits, stages, transfers.

Who sent a message, and which incarnation, its envelope says.
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
    Rebind,
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


class RegisterInstance(Message):
    """An instance offers itself; sent again whenever the head was away. Asks for InstanceWelcome."""

    name: Name
    kind: Name
    """encoder, denoiser, decoder or monolithic."""
    generation: Generation
    pid: Natural
    slots: Natural
    issued: Natural
    """Credits issued by this incarnation so far; only ever grows."""
    taken: Natural
    """Attempts taken by this incarnation so far."""
    pool: Name
    """The buffer pool that it maps, empty for monolithic."""
    signature: Signature
    """What the loaded pipeline takes and makes."""
    running: tuple[Attempt, ...]
    """Attempts assigned, so that a restarted head need not redo them."""
    leaving: bool = False
    """It has been asked to end, and takes nothing more."""
    model: Name = ""
    """Version of the weights that it has loaded, or would load, of `engines.weights.model_version`."""
    awake: bool = True
    """Whether its weights are in memory."""
    device: Name = "cpu"
    """Torch device, a GPU with its number."""
    weights: Natural = 0
    """Bytes of its weights there; 0 where it has not loaded them yet."""


class InstanceWakeChanged(Message):
    """An instance has woken, or has gone to sleep, or could not. Asks for Acknowledged."""

    awake: bool
    signature: Signature
    weights: Natural
    seconds: Seconds
    """That it took."""
    trouble: str = ""
    """Why it could not be woken; a sentence."""


class Sleep(Message):
    """Let go of the weights. Asks for Acknowledged; refused with `busy` while attempts are assigned."""


class Wake(Message):
    """Bring the weights back. Asks for Acknowledged; its end is told by InstanceWakeChanged."""


class InstanceRegistered(Message):
    """The head has registered the instance. Attempts that it does not know must be dropped."""

    unknown: tuple[Attempt, ...] = ()


class InstanceHeartbeat(Message):
    """Said each second. Asks for Acknowledged; refused with `fenced` once the head has given this incarnation up."""

    trouble: str = ""
    """What attempts wait for that a person may have to mend, such as a full disk; a sentence."""


class InstanceStopping(Message):
    """This incarnation has been asked to end: it takes nothing more. Asks for Acknowledged."""


class StageAssign(Message):
    """Run the first stage of a job (all stages, on a monolithic instance). Asks for StageTaken."""

    attempt: Attempt
    inputs: dict[str, Input]
    seed: Seed
    output: Output
    left_s: Seconds
    """Seconds after which the result is of no use."""


class TransferAlloc(Message):
    """Reserve a block in the receiver's own pool. Asks for TransferAllocated or TransferRejected."""

    attempt: Attempt
    nbytes: Natural


class TransferAllocated(Message):
    """The block is reserved for this attempt."""

    attempt: Attempt
    target: LeaseRef


class TransferRejected(Message):
    """No block."""

    attempt: Attempt
    reason: str
    retryable: bool


class BlocksOffered(Message):
    """Blocks of its own pool that a receiver keeps ready, so that TransferAlloc can be skipped. Told at each change."""

    blocks: tuple[LeaseRef, ...]
    """All of them; in place of those offered before."""


class TransferPush(Message):
    """Fetch a job's stored tensors and run your stage on them. Asks for StageTaken."""

    attempt: Attempt
    source: StoredPayload
    target: LeaseRef | None
    """Where the bytes go; None when the source's pool is the receiver's own and is mapped."""
    output: Output
    left_s: Seconds
    """Seconds after which the result is of no use."""
    rebind: Rebind | None = None
    """For tensors that were stored for another job, of an equal prompt."""


class AttemptQuery(Message):
    """Ask which of these attempts an instance has. Asks for AttemptsAssigned."""

    attempts: tuple[Attempt, ...]


class AttemptsAssigned(Message):
    """Those of the attempts asked about that the instance has, or keeps a block for."""

    attempts: tuple[Attempt, ...]


class StageTaken(Message):
    """The instance has taken the attempt; one credit is spent."""

    attempt: Attempt


class StageCancel(Message):
    """Stop this attempt within one step, if the instance still has it."""

    attempt: Attempt
    reason: str


class Acknowledged(Message):
    """The head has acted on the report; it need not be sent again."""


class TransferFailed(Message):
    """The stored tensors could not be fetched; nothing was computed on them."""

    attempt: Attempt
    reason: str
    source_gone: bool
    """The source itself is lost or damaged, so that another receiver would fail as well."""
    issued: Natural


class StageStarted(Message):
    """The stage's first kernel is about to run."""

    attempt: Attempt
    stage: Stage


class StageProgress(Message):
    """A denoising step has finished. Told, not asked: the next one makes up for a lost one."""

    attempt: Attempt
    step: Natural
    total_steps: Natural


class StageOutputsStored(Message):
    """The stage is done and its outputs are sealed in a block."""

    attempt: Attempt
    stage: Stage
    stored: StoredPayload
    seconds: Seconds
    issued: Natural
    seed_independent: bool = False
    """The outputs of an encoder are the same for every seed, but for the generator among them."""


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
    """None where it had not begun."""
    error: str
    retryable: bool
    """False when it would fail anywhere."""
    issued: Natural
    invalid_request: bool = False
    """The request itself is why: one of its values is none that the pipeline can run with."""


class StageReturned(Message):
    """The instance ends before it can have done the attempt: it is for others."""

    attempt: Attempt
    issued: Natural


class StageCancelled(Message):
    """The attempt was dropped because it was told to be."""

    attempt: Attempt
    issued: Natural
