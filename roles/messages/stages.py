"""Head to role instance and back: registration, credits, stages, transfers."""

from __future__ import annotations

from bus import Message
from engines.parameters import Signature
from roles.messages.work import Artifact, Input, LeaseRef, Output, Renewal, Staged, Work


class InstanceHello(Message):
    """An instance offers itself; said again whenever the head was away. Asks for InstanceWelcome."""

    name: str
    kind: str
    """encoder, denoiser, decoder or monolithic."""
    generation: int
    pid: int
    slots: int
    issued: int
    """Credits issued by this incarnation so far; only ever grows."""
    taken: int
    """Units of work taken by this incarnation so far."""
    pool: str
    """The buffer pool that it maps, empty for monolithic."""
    signature: Signature
    """What the loaded pipeline takes and makes."""
    running: tuple[Work, ...]
    """Work in hand, so that a restarted head need not redo it."""
    leaving: bool = False
    """It has been asked to end, and takes nothing more."""
    model: str = ""
    """Version of the weights that it has loaded, of `engines.model_version`."""


class InstanceWelcome(Message):
    """The head has the instance in its books. Work it does not know of must be dropped."""

    unknown: tuple[Work, ...] = ()


class InstanceAlive(Message):
    """Said each second. Asks for Acknowledged; refused with `fenced` once the head has given this incarnation up."""

    name: str
    generation: int
    trouble: str = ""
    """What work waits for that a person may have to mend, such as a full disk; a sentence."""


class InstanceLeaving(Message):
    """This incarnation has been asked to end: it takes nothing more. Asks for Acknowledged."""

    name: str
    generation: int


class StageAssign(Message):
    """Run the first panel of a unit (all panels, on a monolithic instance). Asks for StageTaken."""

    work: Work
    inputs: dict[str, Input]
    seed: int
    output: Output
    left_s: float
    """Seconds after which the result is of no use."""


class TransferAlloc(Message):
    """Reserve a slot in the receiver's own pool. Asks for TransferAllocated or TransferRejected."""

    work: Work
    nbytes: int


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

    instance: str
    generation: int
    slots: tuple[LeaseRef, ...]
    """All of them; in place of those offered before."""


class TransferPush(Message):
    """Fetch a unit's staged tensors and run your panel on them. Asks for StageTaken."""

    work: Work
    source: Staged
    target: LeaseRef | None
    """Where the bytes go; None when the source's pool is the receiver's own and is mapped."""
    output: Output
    left_s: float
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
    instance: str
    seconds: float


class TransferFailed(Message):
    """The staged tensors could not be fetched; nothing was computed on them."""

    work: Work
    instance: str
    reason: str
    source_gone: bool
    """The source itself is lost or damaged, so that another receiver would fail as well."""
    issued: int


class StageStarted(Message):
    """The panel's first kernel is about to run."""

    work: Work
    instance: str
    panel: str


class StageProgress(Message):
    """A denoising step has finished. Told, not asked: the next one makes up for a lost one."""

    work: Work
    step: int
    total_steps: int


class TransferStaged(Message):
    """The panel is done and its outputs are sealed in a slot."""

    work: Work
    instance: str
    panel: str
    staged: Staged
    seconds: float
    issued: int
    seedless: bool = False
    """The outputs of an encoder are the same for every seed, but for the generator among them."""


class StageFinished(Message):
    """The last panel is done and the artifact is on disk."""

    work: Work
    instance: str
    panel: str
    artifact: Artifact
    seconds: float
    issued: int


class StageFailed(Message):
    """The panel raised."""

    work: Work
    instance: str
    panel: str
    error: str
    retryable: bool
    """False when it would fail anywhere."""
    issued: int
    at_fault: bool = False
    """The request itself is why: one of its values is none that the pipeline can run with."""


class StageReturned(Message):
    """The instance ends before it can have done the work: it is for others."""

    work: Work
    instance: str
    issued: int


class StageCancelled(Message):
    """The work was dropped because it was told to be."""

    work: Work
    instance: str
    issued: int
