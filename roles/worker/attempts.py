"""What a role instance has in hand, and what to do next: pure decisions, no clock, no socket, no tensor.

An attempt is taken, goes through its phases, and ends exactly once, with one report that hands its
credit back. Each event method changes the state and returns the effects that the instance carries out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from triptych.bus import Message
from triptych.engines.stages import Stage
from triptych.roles.messages.common import Artifact, Attempt, LeaseRef, Output, StoredPayload
from triptych.roles.messages.stages import (
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
    TransferReady,
)
from triptych.roles.worker.effects import (
    Begin,
    Clear,
    Effect,
    Load,
    ReleaseLease,
    Report,
    Run,
    Save,
    StopRun,
    StopTransfer,
    Store,
    Tell,
)

STAGES_OF_ROLE: dict[str, tuple[Stage, ...]] = {
    "encoder": (Stage.ENCODER,),
    "denoiser": (Stage.DENOISER,),
    "decoder": (Stage.DECODER,),
    "monolithic": (Stage.ENCODER, Stage.DENOISER, Stage.DECODER),
}
"""What each kind of instance runs, in order."""


class Phase(StrEnum):
    """Who has the attempt at present."""

    LOADING = "loading"
    """The transfer actor fetches stored tensors."""
    RUNNING = "running"
    """The stream worker computes it, or has it in its queue."""
    STORING = "storing"
    """The transfer actor puts the outputs into a block."""
    SAVING = "saving"
    """The transfer actor writes the artifact."""


_MakeReport: TypeAlias = Callable[[int], Message]
"""From the number of credits issued to the report that carries it."""
_REMEMBERED = 256


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
    """An assigned attempt."""

    attempt: Attempt
    phase: Phase
    stages: tuple[Stage, ...]
    """Still to run, the current one first."""
    output: Output
    deadline: float
    """In seconds of this host's monotonic clock."""
    seconds: float = 0.0
    """That the last stage took."""
    seed_independent: bool = False
    """What it made is the same for every seed."""
    cancelled: bool = False
    returned: bool = False
    """It is stopped for others to do, not because nobody wants it."""
    began_at: float | None = None
    """When the current stage began to compute, in seconds of a monotonic clock."""
    stepped_at: float = 0.0
    step: int = 0
    total_steps: int = 0

    def left_s(self) -> float:
        """Seconds that the attempt will still take, as far as its pace so far says; 0 when it says nothing."""
        if self.phase is Phase.LOADING or (self.phase is Phase.RUNNING and self.began_at is None):
            return math.inf  # it waits for others, and nothing is lost when it begins elsewhere
        if self.phase is not Phase.RUNNING or self.began_at is None or not self.step:
            return 0.0
        return (self.stepped_at - self.began_at) / self.step * (self.total_steps - self.step)


class AttemptTracker:
    """The attempts of one incarnation of a role instance."""

    def __init__(self, instance: str, kind: str, slots: int) -> None:
        self.instance = instance
        self.kind = kind
        self.slots = slots
        self.taken = 0
        """jobs taken so far."""
        self.ended = 0
        """Of them, those that have ended."""
        self.active: dict[Attempt, ActiveAttempt] = {}
        self.reservations: dict[Attempt, LeaseRef] = {}
        """Blocks of the own pool that wait for a push."""
        self._cancelled: dict[Attempt, None] = {}
        self._ended: dict[Attempt, None] = {}

    @property
    def issued(self) -> int:
        """Credits issued so far: one for each of its slots, and one for each attempt that has ended."""
        return self.slots + self.ended

    @property
    def assigned(self) -> tuple[Attempt, ...]:
        """Oldest first."""
        return tuple(self.active)

    # -- from the head

    def can_reserve(self, attempt: Attempt) -> bool:
        """Whether a block may be reserved for `attempt`: there is a credit that no other counts on."""
        others = sum(reserved != attempt for reserved in self.reservations)
        return attempt not in self.active and len(self.active) + others < self.slots

    def reserve(self, attempt: Attempt, target: LeaseRef) -> tuple[Effect, ...]:
        """Keep a block of the own pool for the push of `attempt`, in place of one reserved before.

        Raises:
            AttemptRefusedError: when the attempt was cancelled while the pool was asked; the block is not kept.

        """
        if attempt in self._cancelled:
            raise AttemptRefusedError("cancelled", f"{attempt} was cancelled")
        before = self.reservations.get(attempt)
        self.reservations[attempt] = target
        return (ReleaseLease(before),) if before is not None and before != target else ()

    def assign(self, message: StageAssign, now: float) -> tuple[Effect, ...]:
        """Take a job at its first stage; nothing more happens when it is assigned already.

        Raises:
            AttemptRefusedError: when none of its slots is free, or this kind starts from stored tensors.

        """
        if self.kind not in ("encoder", "monolithic"):
            raise AttemptRefusedError(
                "wrong_kind",
                f"{self.instance} is a {self.kind}: it starts from stored tensors, not from inputs",
            )
        if not self._take(message.attempt, Phase.RUNNING, message.output, now + message.left_s):
            return ()
        return (
            *self._cancel_older(message.attempt),
            Begin(message.attempt, message.inputs, message.seed),
            Run(message.attempt, self.active[message.attempt].stages[0]),
        )

    def push(self, message: TransferPush, now: float, *, preallocated: bool = False) -> tuple[Effect, ...]:
        """Take a job that starts from stored tensors; nothing more happens when it is assigned already.

        Args:
            message: from the head.
            now: seconds of this host's monotonic clock.
            preallocated: its target was kept ready for any attempt.

        Raises:
            AttemptRefusedError: when none of its slots is free, this kind starts from inputs, or the target is kept for
            it no more.

        """
        if self.kind not in ("denoiser", "decoder"):
            raise AttemptRefusedError(
                "wrong_kind",
                f"{self.instance} is a {self.kind}: it starts from inputs, not from stored tensors",
            )
        kept = preallocated or message.target in (None, self.reservations.get(message.attempt))
        if not kept and not any(message.attempt in known for known in (self.active, self._ended, self._cancelled)):
            raise AttemptRefusedError(
                "block_gone", f"{self.instance} no longer keeps the block that {message.attempt} was to come into"
            )
        if not self._take(message.attempt, Phase.LOADING, message.output, now + message.left_s):
            return ()
        reserved = self.reservations.pop(message.attempt, None)
        unused = (ReleaseLease(reserved),) if reserved is not None and reserved != message.target else ()
        return (
            *unused,
            *self._cancel_older(message.attempt),
            Begin(message.attempt, {}, 0, message.rebind),
            Load(message.attempt, message.source, message.target, now + message.left_s),
        )

    def cancel(self, attempt: Attempt) -> tuple[Effect, ...]:
        """Stop `attempt` as soon as its phase allows; it will not be taken again."""
        _remember(self._cancelled, attempt)
        item = self.active.get(attempt)
        if item is None:
            target = self.reservations.pop(attempt, None)
            return (ReleaseLease(target),) if target else ()
        if item.cancelled:
            return ()
        item.cancelled = True
        return (StopRun(attempt) if item.phase is Phase.RUNNING else StopTransfer(attempt),)

    def return_to_head(self, within_s: float | None) -> tuple[Effect, ...]:
        """Stop what would take more than `within_s` seconds, for others to do; None: all that is not computed yet."""
        effects: list[Effect] = []
        for item in tuple(self.active.values()):
            computed = item.phase in (Phase.STORING, Phase.SAVING)
            if not (item.cancelled or computed) and (within_s is None or item.left_s() > within_s):
                item.returned = True
                effects += self.cancel(item.attempt)
        return tuple(effects)

    def drop_reservations(self) -> tuple[Effect, ...]:
        """Give up what a head asked for that is gone: it will ask again."""
        leases, self.reservations = tuple(self.reservations.values()), {}
        return tuple(ReleaseLease(lease) for lease in leases)

    # -- from the stream worker

    def run_started(self, attempt: Attempt, stage: Stage, now: float) -> tuple[Effect, ...]:
        """Report that the first kernel is about to run."""
        item = self._item(attempt, "a stage started", Phase.RUNNING)
        item.began_at, item.step, item.total_steps = now, 0, 0
        if item.cancelled:
            return ()
        return (Report(StageStarted(attempt, self.instance, stage)),)

    def run_stepped(self, attempt: Attempt, step: int, total_steps: int, now: float) -> tuple[Effect, ...]:
        """Mention that a denoising step is done."""
        item = self._item(attempt, "a step ended", Phase.RUNNING)
        item.stepped_at, item.step, item.total_steps = now, step, total_steps
        return (Tell(StageProgress(attempt, step, total_steps)),)

    def run_finished(self, attempt: Attempt, seconds: float, *, seed_independent: bool = False) -> tuple[Effect, ...]:
        """Run the next stage on the outputs, or store them, or save them."""
        item = self._item(attempt, "a stage finished", Phase.RUNNING)
        if item.cancelled:
            return self._end_cancelled(item)
        item.seconds, item.seed_independent = seconds, seed_independent
        done, *left = item.stages
        if left:
            item.stages = tuple(left)
            return (Run(attempt, left[0]),)
        if done is Stage.DECODER:
            item.phase = Phase.SAVING
            return (Save(attempt, item.output, item.deadline),)
        item.phase = Phase.STORING
        return (Store(attempt, item.deadline),)

    def run_failed(
        self, attempt: Attempt, error: str, *, invalid_request: bool, deterministic: bool = False
    ) -> tuple[Effect, ...]:
        """End the attempt: the stage raised; it is not tried again where the request is at fault or nothing changes."""
        item = self._item(attempt, "a stage failed", Phase.RUNNING)
        if item.cancelled:
            return self._end_cancelled(item)
        return self._end_failed(
            item, error, retryable=not (invalid_request or deterministic), invalid_request=invalid_request
        )

    def run_cancelled(self, attempt: Attempt) -> tuple[Effect, ...]:
        """End the attempt: the stream worker has stopped as told."""
        item = self._item(attempt, "a stage was cancelled", Phase.RUNNING)
        if not item.cancelled:
            raise UnexpectedEventError(attempt, "a stage was cancelled that was not to be", item.phase)
        return self._end_cancelled(item)

    # -- from the transfer actor

    def inputs_loaded(self, attempt: Attempt, seconds: float) -> tuple[Effect, ...]:
        """Run the stage on what was loaded."""
        item = self._item(attempt, "inputs were loaded", Phase.LOADING)
        if item.cancelled:
            return self._end_cancelled(item)
        item.phase = Phase.RUNNING
        return (Report(TransferReady(attempt, self.instance, seconds)), Run(attempt, item.stages[0]))

    def outputs_stored(self, attempt: Attempt, stored: StoredPayload) -> tuple[Effect, ...]:
        """End the attempt: its outputs lie in a sealed block."""
        item = self._item(attempt, "outputs were stored", Phase.STORING)
        if item.cancelled:
            return (ReleaseLease(stored.lease), *self._end_cancelled(item))
        stage, seconds, seed_independent = item.stages[0], item.seconds, item.seed_independent
        return self._end(
            item,
            lambda issued: StageOutputsStored(attempt, self.instance, stage, stored, seconds, issued, seed_independent),
        )

    def artifact_saved(self, attempt: Attempt, artifact: Artifact) -> tuple[Effect, ...]:
        """End the attempt: the file is on disk.

        One that was cancelled meanwhile is left to the store's pruning: another attempt may have written the
        same file.
        """
        item = self._item(attempt, "an artifact was saved", Phase.SAVING)
        if item.cancelled:
            return self._end_cancelled(item)
        return self._end(
            item,
            lambda issued: StageFinished(attempt, self.instance, item.stages[0], artifact, item.seconds, issued),
        )

    def transfer_task_failed(
        self, attempt: Attempt, reason: str, *, source_gone: bool, retryable: bool
    ) -> tuple[Effect, ...]:
        """End the attempt: loading, storing or saving came to nothing."""
        item = self._item(attempt, "a transfer failed", Phase.LOADING, Phase.STORING, Phase.SAVING)
        if item.cancelled:
            return self._end_cancelled(item)
        if item.phase is not Phase.LOADING:
            return self._end_failed(item, reason, retryable=retryable)
        return self._end(item, lambda issued: TransferFailed(attempt, self.instance, reason, source_gone, issued))

    # -- inside

    def _take(self, attempt: Attempt, phase: Phase, output: Output, deadline: float) -> bool:
        item = self.active.get(attempt)
        if attempt in self._cancelled:
            raise AttemptRefusedError("cancelled", f"{attempt} was cancelled")
        if item is not None or attempt in self._ended:  # asked again, because the answer was late
            return False
        if len(self.active) >= self.slots:
            raise AttemptRefusedError(
                "no_credit", f"{self.instance} has {len(self.active)} attempts assigned and {self.slots} slots"
            )
        self.taken += 1
        self.active[attempt] = ActiveAttempt(attempt, phase, STAGES_OF_ROLE[self.kind], output, deadline)
        return True

    def _cancel_older(self, attempt: Attempt) -> tuple[Effect, ...]:
        """Cancel older attempts at the same job: nobody waits for them."""
        older = [
            w for w in (*self.active, *self.reservations) if w.job_id == attempt.job_id and w.number < attempt.number
        ]
        return tuple(effect for w in older for effect in self.cancel(w))

    def _item(self, attempt: Attempt, event: str, *phases: Phase) -> ActiveAttempt:
        item = self.active.get(attempt)
        if item is None or item.phase not in phases:
            raise UnexpectedEventError(attempt, event, item.phase if item else None)
        return item

    def _end(self, item: ActiveAttempt, report: _MakeReport) -> tuple[Effect, ...]:
        del self.active[item.attempt]
        self.ended += 1
        _remember(self._ended, item.attempt)
        return (Clear(item.attempt), Report(report(self.issued)))

    def _end_cancelled(self, item: ActiveAttempt) -> tuple[Effect, ...]:
        report = StageReturned if item.returned else StageCancelled
        return self._end(item, lambda issued: report(item.attempt, self.instance, issued))

    def _end_failed(
        self, item: ActiveAttempt, error: str, *, retryable: bool, invalid_request: bool = False
    ) -> tuple[Effect, ...]:
        stage = item.stages[0]
        return self._end(
            item,
            lambda issued: StageFailed(item.attempt, self.instance, stage, error, retryable, issued, invalid_request),
        )


def _remember(memory: dict[Attempt, None], attempt: Attempt) -> None:
    memory[attempt] = None
    if len(memory) > _REMEMBERED:
        del memory[next(iter(memory))]
