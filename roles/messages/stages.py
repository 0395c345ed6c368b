"""Head to role instance and back: registration, credits, stages, transfers."""

from __future__ import annotations

from triptych.bus import Generation, Message
from triptych.engines.panels import Panel
from triptych.engines.parameters import Signature
from triptych.roles.messages.work import (
    Artifact,
    Input,
    LeaseRef,
    Name,
    Natural,
    Output,
    Renewal,
    Seconds,
    Seed,
    Staged,
    Work,
)


class InstanceHello(Message):
    """An instance offers itself; said again whenever the head was away. Asks for InstanceWelcome."""

    name: Name
    kind: Name
    """encoder, denoiser, decoder or monolithic."""
    generation: Generation
    pid: Natural
    slots: Natural
    issued: Natural
    """Credits issued by this incarnation so far; only ever grows."""
    taken: Natural
    """Units of work taken by this incarnation so far."""
    pool: Name
    """The buffer pool that it maps, empty for monolithic."""
    signature: Signature
    """What the loaded pipeline takes and makes."""
    running: tuple[Work, ...]
    """Work in hand, so that a restarted head need not redo it."""
    leaving: bool = False
    """It has been asked to end, and takes nothing more."""
    model: Name = ""
    """Version of the weights that it has loaded, or would load, of `engines.model_version`."""
    awake: bool = True
    """Whether its weights are in memory."""
    device: Name = "cpu"
    """Torch device, a card with its number."""
    weights: Natural = 0
    """Bytes of its weights there; 0 where it has not loaded them yet."""


class InstanceAwake(Message):
    """An instance has woken, or has gone to sleep, or could not. Asks for Acknowledged."""

    name: Name
    generation: Generation
    awake: bool
    signature: Signature
    weights: Natural
    seconds: Seconds
    """That it took."""
    trouble: str = ""
    """Why it could not be woken; a sentence."""


class Sleep(Message):
    """Let go of the weights. Asks for Acknowledged; refused with `busy` while there is work in hand."""


class Wake(Message):
    """Bring the weights back. Asks for Acknowledged; the end of it is told by InstanceAwake."""


class InstanceWelcome(Message):
    """The head has the instance in its books. Work it does not know of must be dropped."""

    unknown: tuple[Work, ...] = ()


class InstanceAlive(Message):
    """Said each second. Asks for Acknowledged; refused with `fenced` once the head has given this incarnation up."""

    name: Name
    generation: Generation
    trouble: str = ""
    """What work waits for that a person may have to mend, such as a full disk; a sentence."""


class InstanceLeaving(Message):
    """This incarnation has been asked to end: it takes nothing more. Asks for Acknowledged."""

    name: Name
    generation: Generation


class StageAssign(Message):
    """Run the first panel of a unit (all panels, on a monolithic instance). Asks for StageTaken."""

    work: Work
    inputs: dict[str, Input]
    seed: Seed
    output: Output
    left_s: Seconds
    """Seconds after which the result is of no use."""


class TransferAlloc(Message):
    """Reserve a slot in the receiver's own pool. Asks for TransferAllocated or TransferRejected."""

    work: Work
    nbytes: Natural


class TransferAllocated(Message):
    """The slot is reserved for this work."""

    work: Work
    target: LeaseRef


class TransferRejected(Message):
    """No slot."""

    work: Work
    reason: str
    retryable: bool


class SlotsOffered(Message):
    """Slots of its own pool that a receiver keeps ready, so that TransferAlloc can be skipped. Told at each change."""

    instance: Name
    generation: Generation
    slots: tuple[LeaseRef, ...]
    """All of them; in place of those offered before."""


class TransferPush(Message):
    """Fetch a unit's staged tensors and run your panel on them. Asks for StageTaken."""

    work: Work
    source: Staged
    target: LeaseRef | None
    """Where the bytes go; None when the source's pool is the receiver's own and is mapped."""
    output: Output
    left_s: Seconds
    """Seconds after which the result is of no use."""
    renewal: Renewal | None = None
    """For tensors that were staged for another unit, of an equal prompt."""


class WorkQuery(Message):
    """Which of these works are in hand? Asks for WorkInHand."""

    works: tuple[Work, ...]


class WorkInHand(Message):
    """Those of the works asked about that the instance has, or keeps a slot for."""

    works: tuple[Work, ...]


class StageTaken(Message):
    """The instance has the work in hand; one credit is spent."""

    work: Work


class StageCancel(Message):
    """Stop this work within one step, if it is still in hand."""

    work: Work
    reason: str


class Acknowledged(Message):
    """The head has acted on the report; it need not be sent again."""


class TransferReady(Message):
    """The staged tensors have arrived, match their checksum and are loaded."""

    work: Work
    instance: Name
    seconds: Seconds


class TransferFailed(Message):
    """The staged tensors could not be fetched; nothing was computed on them."""

    work: Work
    instance: Name
    reason: str
    source_gone: bool
    """The source itself is lost or damaged, so that another receiver would fail as well."""
    issued: Natural


class StageStarted(Message):
    """The panel's first kernel is about to run."""

    work: Work
    instance: Name
    panel: Panel


class StageProgress(Message):
    """A denoising step has finished. Told, not asked: the next one makes up for a lost one."""

    work: Work
    step: Natural
    total_steps: Natural


class TransferStaged(Message):
    """The panel is done and its outputs are sealed in a slot."""

    work: Work
    instance: Name
    panel: Panel
    staged: Staged
    seconds: Seconds
    issued: Natural
    seedless: bool = False
    """The outputs of an encoder are the same for every seed, but for the generator among them."""


class StageFinished(Message):
    """The last panel is done and the artifact is on disk."""

    work: Work
    instance: Name
    panel: Panel
    artifact: Artifact
    seconds: Seconds
    issued: Natural


class StageFailed(Message):
    """The panel raised."""

    work: Work
    instance: Name
    panel: Panel | None
    """None where it had not begun."""
    error: str
    retryable: bool
    """False when it would fail anywhere."""
    issued: Natural
    at_fault: bool = False
    """The request itself is why: one of its values is none that the pipeline can run with."""


class StageReturned(Message):
    """The instance ends before it can have done the work: it is for others."""

    work: Work
    instance: Name
    issued: Natural


class StageCancelled(Message):
    """The work was dropped because it was told to be."""

    work: Work
    instance: Name
    issued: Natural
