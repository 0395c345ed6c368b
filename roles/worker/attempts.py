"""Track the attempts of a role process and decide what happens to each next. Pure: no clock, no socket.

An attempt is taken by the instance, passes from actor to actor, and ends exactly once, with one report that returns
its credit. A method returns the messages to send next; the type of each says which actor receives it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from msgspec.structs import replace

from triptych.bus import Message
from triptych.engines.stages import Stage
from triptych.roles.messages.common import (
    Artifact,
    Attempt,
    LeaseRef,
    Output,
    Provenance,
    Rebind,
    SchedulingHints,
    StoredPayload,
    uploads_of,
)
from triptych.roles.messages.pool import ReleaseBlocks
from triptych.roles.messages.stages import (
    CheckpointStored,
    StageAssign,
    StageCancelled,
    StageFailed,
    StageFinished,
    StageOutputsStored,
    StageProgress,
    StageReturned,
    StageStarted,
    TransferFailed,
    TransferPush,
)
from triptych.roles.messages.worker import (
    CancelAttempt,
    FetchUploads,
    LoadInputs,
    RunStage,
    SaveArtifact,
    StoreCheckpoint,
    StoreOutputs,
)

if TYPE_CHECKING:
    from triptych.engines.memory.streams import StreamEvent

V = TypeVar("V")
EndReport: TypeAlias = (
    StageOutputsStored | StageFinished | StageFailed | TransferFailed | StageCancelled | StageReturned
)
"""The report that ends an attempt."""
NextStep: TypeAlias = RunStage | StoreOutputs | StoreCheckpoint | SaveArtifact | StageCancelled | StageReturned
"""What one actor passes on to the next."""

STAGES_OF_ROLE: dict[str, tuple[Stage, ...]] = {
    "encoder": (Stage.ENCODER,),
    "denoiser": (Stage.DENOISER,),
    "decoder": (Stage.DECODER,),
    "monolithic": (Stage.ENCODER, Stage.DENOISER, Stage.DECODER),
}
"""What each kind of instance runs, in order."""


class Phase(StrEnum):
    """Which actor has the attempt at present, and for what."""

    LOADING = "loading"
    """The transfer actor fetches stored tensors."""
    FETCHING = "fetching"
    """The transfer actor brings the uploads that the inputs refer to."""
    RUNNING = "running"
    """The stream worker computes it, or has it in its queue."""
    STORING = "storing"
    """The transfer actor puts the outputs into a block."""
    SAVING = "saving"
    """The transfer actor writes the artifact."""


_REMEMBERED: Final = 256
"""Most ended, and most cancelled, attempts that are remembered."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a denoise has made so far, on its way into a block."""

    step: int
    """Steps that are done in it."""
    values: dict[str, object]
    """Of `Denoising.snapshot`."""
    ready: StreamEvent
    """Recorded after the copies that it is made of."""


class AttemptRefusedError(Exception):
    """The attempt cannot be taken now; `code` is no_credit, wrong_kind, block_gone or cancelled."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class UnexpectedEventError(Exception):
    """An event that cannot happen to this attempt now: a defect of this process, which has to start anew."""

    def __init__(self, attempt: Attempt, event: str, phase: Phase | None) -> None:
        super().__init__(f"{attempt}: {event} while it is {phase.value if phase else 'not assigned'}")


@dataclass(slots=True)
class ActiveAttempt:
    """An assigned attempt: all that the three actors of the process know of it."""

    attempt: Attempt
    phase: Phase
    stages: tuple[Stage, ...]
    """Still to run, the current one first."""
    output: Output
    deadline: float
    """In seconds of this host's monotonic clock."""
    values: dict[str, object] = field(default_factory=dict)
    """Inputs of the next stage, by name: tensors on the device, and plain values."""
    seed: int = 0
    """Seed of the job; the encoder makes its generator from it."""
    rebind: Rebind | None = None
    """Adapts loaded values to this attempt if they were made for another request."""
    provenance: Provenance | None = None
    """What the file that it writes is made from; None for a file without metadata, and if it writes none."""
    ready: StreamEvent | None = None
    """Recorded after the work that makes `values`: wait for it before using them on another stream."""
    block: LeaseRef | None = None
    """Block that was leased for its outputs while they were computed."""
    resume: dict[str, object] | None = None
    """The snapshot that the denoise goes on from, until it has begun; None to begin at the beginning."""
    snapshot: Snapshot | None = None
    """The one that the transfer actor puts into a block at present."""
    resumed_from: int = 0
    """Steps that an earlier attempt has computed."""
    seconds: float = 0.0
    """Duration of the last stage."""
    seed_independent: bool = False
    """Whether its outputs are the same for every seed."""
    cancelled: bool = False
    """Whether it is to end as soon as its phase allows."""
    returned: bool = False
    """Whether it is stopped so that another instance takes it."""
    parking: bool = False
    """Whether it is to be given back for a more urgent job, once a checkpoint of it is stored."""
    loaded_at: float = 0.0
    """When it had its inputs, in seconds of this host's monotonic clock."""
    waited_s: float = 0.0
    """Seconds from then to the beginning of its first stage."""
    began_at: float | None = None
    """When the current stage began to compute, in seconds of a monotonic clock."""
    stepped_at: float = 0.0
    step: int = 0
    total_steps: int = 0
    accepted_at: float = 0.0
    """When its request was accepted, in unix seconds."""
    hints: SchedulingHints = field(default_factory=SchedulingHints)
    previews: int = 0
    """Most previews that its denoise stores."""
    due: float = math.inf
    """When the client wants the result, in seconds of this host's monotonic clock; infinite without a deadline."""

    def left_s(self) -> float:
        """Return the estimated seconds that the attempt still takes; 0 if unknown, infinite if it has not begun."""
        if self.phase in (Phase.LOADING, Phase.FETCHING) or (self.phase is Phase.RUNNING and self.began_at is None):
            return math.inf  # not begun: nothing is lost when it begins on another instance
        computed = self.step - self.resumed_from
        if self.phase is not Phase.RUNNING or self.began_at is None or computed <= 0:
            return 0.0
        return (self.stepped_at - self.began_at) / computed * (self.total_steps - self.step)


@dataclass(frozen=True, slots=True)
class PreviewValues:
    """The payload of a preview, on the device."""

    values: dict[str, object]
    ready: StreamEvent
    """Recorded after the work that makes `values`."""


class AttemptTracker:
    """The attempts of one incarnation of a role process. Used from the event loop's thread alone."""

    def __init__(self, instance: str, kind: str, slots: int, *, fetches_uploads: bool = False) -> None:
        self.instance = instance
        self.kind = kind
        self.slots = slots
        self.fetches_uploads = fetches_uploads
        """Whether uploads have to be brought to this host before a stage can read them."""
        self.taken = 0
        """Attempts taken so far."""
        self.ended = 0
        """Attempts that have ended so far."""
        self.active: dict[Attempt, ActiveAttempt] = {}
        self.reservations: dict[Attempt, LeaseRef] = {}
        """Blocks of the instance's pool that are reserved for a push."""
        self.previews: dict[Attempt, PreviewValues] = {}
        """Previews that the transfer actor stores, by their own attempts."""
        self._cancelled: dict[Attempt, None] = {}
        self._ended: dict[Attempt, float] = {}
        """When the requests of ended attempts were accepted."""

    @property
    def issued(self) -> int:
        """Return the credits issued so far: one for each slot, and one for each attempt that has ended."""
        return self.slots + self.ended

    @property
    def assigned(self) -> tuple[Attempt, ...]:
        """Return the active attempts, oldest first."""
        return tuple(self.active)

    def begun(self) -> tuple[StageStarted, ...]:
        """Return what a new head is told of the stages that have begun."""
        return tuple(
            StageStarted(item.attempt, item.stages[0], item.waited_s)
            for item in self.active.values()
            if item.began_at is not None
        )

    # -- the instance: what the head sends

    def can_reserve(self, attempt: Attempt) -> bool:
        """Return whether a block may be reserved for `attempt`: a slot is free that no other reservation needs."""
        others = sum(reserved != attempt for reserved in self.reservations)
        return attempt not in self.active and len(self.active) + others < self.slots

    def reserve(self, attempt: Attempt, target: LeaseRef) -> tuple[Message, ...]:
        """Reserve a block of the instance's pool for the push of `attempt`, in place of one reserved before.

        Raises:
            AttemptRefusedError: when the attempt was cancelled while the pool was asked; the block is not kept.

        """
        if attempt in self._cancelled:
            raise AttemptRefusedError("cancelled", f"{attempt} was cancelled")
        before = self.reservations.get(attempt)
        self.reservations[attempt] = target
        return (ReleaseBlocks((before,)),) if before is not None and before != target else ()

    def assign(self, message: StageAssign, now: float) -> tuple[Message, ...]:
        """Take a job at its first stage; nothing more happens when it is assigned already.

        Raises:
            AttemptRefusedError: when none of its slots is free, or this kind starts from stored tensors.

        """
        attempt = message.attempt
        if self.kind not in ("encoder", "monolithic"):
            raise AttemptRefusedError(
                "wrong_kind",
                f"{self.instance} is a {self.kind}: it starts from stored tensors, not from inputs",
            )
        item = self._take(message, Phase.RUNNING, now)
        if item is None:
            return ()
        item.values, item.seed = dict(message.inputs), message.seed
        if message.output.metadata and item.stages[-1] is Stage.DECODER:
            item.provenance = Provenance(message.model, message.inputs, message.seed)
        first: Message = RunStage(attempt, item.stages[0])
        if self.fetches_uploads and (uploads := uploads_of(message.inputs)):
            item.phase = Phase.FETCHING
            first = FetchUploads(attempt, tuple(sorted(uploads, key=lambda upload: upload.name)), item.deadline)
        return (*self._cancel_older(attempt), first)

    def push(self, message: TransferPush, now: float, *, preallocated: bool = False) -> tuple[Message, ...]:
        """Take a job that starts from stored tensors; nothing more happens when it is assigned already.

        Args:
            message: from the head.
            now: seconds of this host's monotonic clock.
            preallocated: its target was kept ready for any attempt.

        Raises:
            AttemptRefusedError: when none of its slots is free, this kind starts from inputs, or the target is kept for
            it no more.

        """
        attempt = message.attempt
        if self.kind not in ("denoiser", "decoder"):
            raise AttemptRefusedError(
                "wrong_kind",
                f"{self.instance} is a {self.kind}: it starts from inputs, not from stored tensors",
            )
        kept = preallocated or message.target in (None, self.reservations.get(attempt))
        if not (kept or attempt in self.active or attempt in self._cancelled or self._has_ended(message)):
            raise AttemptRefusedError(
                "block_gone", f"{self.instance} no longer keeps the block that {attempt} was to come into"
            )
        item = self._take(message, Phase.LOADING, now)
        if item is None:
            return ()
        item.rebind, item.previews, item.provenance = message.rebind, message.partial_images, message.provenance
        reserved = self.reservations.pop(attempt, None)
        unused = (ReleaseBlocks((reserved,)),) if reserved is not None and reserved != message.target else ()
        return (
            *unused,
            *self._cancel_older(attempt),
            LoadInputs(attempt, message.source, message.target, item.deadline, message.checkpoint),
        )

    def cancel(self, attempt: Attempt) -> tuple[Message, ...]:
        """Stop `attempt` as soon as its phase allows; it will not be taken again."""
        _remember(self._cancelled, attempt, None)
        item = self.active.get(attempt)
        if item is None:
            target = self.reservations.pop(attempt, None)
            return (ReleaseBlocks((target,)),) if target else ()
        item.parking = False
        if item.cancelled:
            return ()
        item.cancelled = True
        return (CancelAttempt(attempt),)

    def return_to_head(self, within_s: float | None) -> tuple[Message, ...]:
        """Stop attempts that would take more than `within_s` seconds, None: all not computed yet; others take them."""
        messages: list[Message] = []
        for item in tuple(self.active.values()):
            computed = item.phase in (Phase.STORING, Phase.SAVING)
            if not (item.cancelled or computed) and (within_s is None or item.left_s() > within_s):
                item.returned = True
                messages += self.cancel(item.attempt)
        return tuple(messages)

    def park(self, attempt: Attempt) -> tuple[Message, ...]:
        """Give a denoise back for a more urgent job: at once if it has not begun, else after its next checkpoint.

        One that has ended by then is not given back, nor one of which no checkpoint can be stored.
        """
        item = self.active.get(attempt)
        if item is None:  # not here yet: it is refused when it comes
            return self.cancel(attempt)
        if item.cancelled or self.kind != "denoiser" or item.phase not in (Phase.LOADING, Phase.RUNNING):
            return ()
        item.parking = True
        return () if item.began_at is not None else self._give_back(item)

    def checkpoint_ended(self, attempt: Attempt, *, stored: bool) -> tuple[Message, ...]:
        """Give a denoise back that is to be parked, as its checkpoint is stored; without one it goes on."""
        item = self.active.get(attempt)
        if item is None or not item.parking or item.cancelled or item.phase is not Phase.RUNNING:
            return ()
        if stored:
            return self._give_back(item)
        item.parking = False
        return ()

    def drop_reservations(self) -> tuple[Message, ...]:
        """Release the blocks reserved for a head that has ended; the next one asks again."""
        leases, self.reservations = tuple(self.reservations.values()), {}
        return (ReleaseBlocks(leases),) if leases else ()

    def end(self, report: EndReport) -> tuple[Message, ...]:
        """Forget an attempt, with its tensors, and return the report of its end, which issues a new credit.

        If it was cancelled meanwhile, the report says so, and stored outputs are released, as is a block that was
        leased for outputs and not used. A written file stays until
        the store prunes it: another attempt may have written the same file.
        """
        item = self._item(report.attempt, "it ended", *Phase)
        unused = [item.block] if item.block else []
        if item.cancelled:
            if isinstance(report, StageOutputsStored):
                unused.append(report.stored.lease)
            report = self._cancelled_report(item)
        released: tuple[Message, ...] = (ReleaseBlocks(tuple(unused)),) if unused else ()
        del self.active[item.attempt]
        self.ended += 1
        _remember(self._ended, item.attempt, item.accepted_at)
        return (*released, replace(report, issued=self.issued))

    # -- the stream worker

    def started(self, attempt: Attempt, stage: Stage, now: float) -> StageStarted:
        """Record that the stage is about to run."""
        item = self._item(attempt, "a stage started", Phase.RUNNING)
        item.waited_s = max(0.0, now - item.loaded_at) if item.began_at is None else 0.0
        item.began_at, item.step, item.total_steps = now, 0, 0
        return StageStarted(attempt, stage, item.waited_s)

    def stepped(self, attempt: Attempt, step: int, total_steps: int, now: float) -> StageProgress:
        """Record a finished denoising step."""
        item = self._item(attempt, "a step ended", Phase.RUNNING)
        item.stepped_at, item.step, item.total_steps = now, step, total_steps
        return StageProgress(attempt, step, total_steps)

    def computed(self, attempt: Attempt, seconds: float, *, seed_independent: bool = False) -> NextStep:
        """Return what follows a computed stage: run the next stage on its outputs, store them, or save them."""
        item = self._item(attempt, "a stage was computed", Phase.RUNNING)
        if item.parking:  # it has ended before it was parked
            item.parking = item.returned = item.cancelled = False
        if item.cancelled:
            return self._cancelled_report(item)
        item.seconds, item.seed_independent = seconds, seed_independent
        done, *left = item.stages
        if left:
            item.stages = tuple(left)
            return RunStage(attempt, left[0])
        if done is Stage.DECODER:
            item.phase = Phase.SAVING
            return SaveArtifact(attempt, item.output, item.deadline, item.provenance)
        item.phase = Phase.STORING
        return StoreOutputs(attempt, item.deadline)

    def stage_failed(
        self, attempt: Attempt, error: str, *, invalid_request: bool, deterministic: bool = False
    ) -> StageFailed:
        """Report that the stage raised; it is retryable unless the request is at fault or the error deterministic."""
        item = self._item(attempt, "a stage failed", Phase.RUNNING)
        retryable = not (invalid_request or deterministic)
        return StageFailed(attempt, item.stages[0], error, retryable, 0, invalid_request)

    def stopped(self, attempt: Attempt) -> StageCancelled | StageReturned:
        """Report that the stage was stopped because the attempt was cancelled."""
        item = self._item(attempt, "a stage was stopped", Phase.RUNNING)
        if not item.cancelled:
            raise UnexpectedEventError(attempt, "a stage was stopped that was not to be", item.phase)
        return self._cancelled_report(item)

    def interrupted(self, attempt: Attempt, snapshot: Snapshot) -> StoreCheckpoint:
        """Return what follows a denoise that was stopped for another instance to go on with its snapshot."""
        item = self._item(attempt, "a denoise was interrupted", Phase.RUNNING)
        item.phase, item.snapshot = Phase.STORING, snapshot
        return StoreCheckpoint(attempt, returns=True)

    # -- the transfer actor

    def checkpointed(self, attempt: Attempt, step: int, stored: StoredPayload) -> CheckpointStored | ReleaseBlocks:
        """Return what becomes of the sealed block of a checkpoint: it is reported, or of no use any more."""
        item = self.active.get(attempt)
        if item is None or (item.cancelled and not item.returned) or not (item.returned or item.phase is Phase.RUNNING):
            return ReleaseBlocks((stored.lease,))
        return CheckpointStored(attempt, step, stored)

    def handed_over(self, attempt: Attempt) -> StageReturned | StageCancelled:
        """Report that nothing more is done for an interrupted denoise."""
        return self._cancelled_report(self._item(attempt, "its last checkpoint was stored", Phase.STORING))

    def loaded(self, attempt: Attempt, now: float) -> NextStep:
        """Return the stage to run on the loaded or fetched inputs."""
        item = self._item(attempt, "inputs were loaded", Phase.LOADING, Phase.FETCHING)
        if item.cancelled:
            return self._cancelled_report(item)
        item.phase, item.loaded_at = Phase.RUNNING, now
        return RunStage(attempt, item.stages[0])

    def stored(self, attempt: Attempt, stored: StoredPayload) -> StageOutputsStored:
        """Report the sealed block of the outputs."""
        item = self._item(attempt, "outputs were stored", Phase.STORING)
        stage = item.stages[0]
        return StageOutputsStored(attempt, stage, stored, item.seconds, 0, item.seed_independent)

    def saved(self, attempt: Attempt, artifact: Artifact) -> StageFinished:
        """Report that the artifact is on disk."""
        item = self._item(attempt, "an artifact was saved", Phase.SAVING)
        return StageFinished(attempt, item.stages[0], artifact, item.seconds, 0)

    def transfer_failed(
        self,
        attempt: Attempt,
        reason: str,
        *,
        source_gone: bool = False,
        retryable: bool = True,
        invalid_request: bool = False,
    ) -> StageFailed | TransferFailed:
        """Report that fetching, loading, storing or saving failed."""
        item = self._item(attempt, "a transfer failed", Phase.LOADING, Phase.FETCHING, Phase.STORING, Phase.SAVING)
        if item.phase is Phase.LOADING:
            return TransferFailed(attempt, reason, source_gone, 0)
        return StageFailed(attempt, item.stages[0], reason, retryable, 0, invalid_request)

    # -- inside

    def _take(self, message: StageAssign | TransferPush, phase: Phase, now: float) -> ActiveAttempt | None:
        """Spend a credit on the attempt; None when it was taken before."""
        attempt, hints = message.attempt, message.hints
        if attempt in self._cancelled:
            raise AttemptRefusedError("cancelled", f"{attempt} was cancelled")
        if self._has_ended(message):  # asked again, because the answer was late
            return None
        if item := self.active.get(attempt):
            if item.accepted_at == message.accepted_at:  # asked again, too
                return None
            raise AttemptRefusedError("cancelled", f"{attempt} of a request that was deleted has not ended yet")
        if len(self.active) >= self.slots:
            raise AttemptRefusedError(
                "no_credit", f"{self.instance} has {len(self.active)} attempts assigned and {self.slots} slots"
            )
        self.taken += 1
        item = ActiveAttempt(attempt, phase, STAGES_OF_ROLE[self.kind], message.output, now + message.left_s)
        item.accepted_at = message.accepted_at
        item.hints, item.due = hints, math.inf if hints.due_s is None else now + hints.due_s
        item.loaded_at = now
        self.active[attempt] = item
        return item

    def _has_ended(self, message: StageAssign | TransferPush) -> bool:
        return self._ended.get(message.attempt) == message.accepted_at

    def _cancel_older(self, attempt: Attempt) -> tuple[Message, ...]:
        """Cancel older attempts at the same job, which `attempt` supersedes."""
        older = [
            w for w in (*self.active, *self.reservations) if w.job_id == attempt.job_id and w.number < attempt.number
        ]
        return tuple(message for w in older for message in self.cancel(w))

    def _give_back(self, item: ActiveAttempt) -> tuple[Message, ...]:
        item.returned = item.cancelled = True
        return (CancelAttempt(item.attempt),)

    def _item(self, attempt: Attempt, event: str, *phases: Phase) -> ActiveAttempt:
        item = self.active.get(attempt)
        if item is None or item.phase not in phases:
            raise UnexpectedEventError(attempt, event, item.phase if item else None)
        return item

    def _cancelled_report(self, item: ActiveAttempt) -> StageCancelled | StageReturned:
        return (StageReturned if item.returned else StageCancelled)(item.attempt, 0)


def _remember(memory: dict[Attempt, V], attempt: Attempt, value: V) -> None:
    memory[attempt] = value
    if len(memory) > _REMEMBERED:
        del memory[next(iter(memory))]
