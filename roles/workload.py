"""What a role instance has in hand, and what to do next: pure decisions, no clock, no socket, no tensor.

A piece of work is taken, goes through its phases, and ends exactly once, with one report that hands its
credit back. Each event method changes the books and returns the effects that the instance carries out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from triptych.bus import Message
from triptych.engines.panels import Panel
from triptych.roles.messages.stages import (
    StageAssign,
    StageCancelled,
    StageFailed,
    StageFinished,
    StageProgress,
    StageReturned,
    StageStarted,
    TransferFailed,
    TransferPush,
    TransferReady,
    TransferStaged,
)
from triptych.roles.messages.work import Artifact, LeaseRef, Output, Staged, Work
from triptych.roles.workload_effects import (
    Begin,
    Clear,
    Effect,
    Load,
    Mention,
    Release,
    Report,
    Run,
    Save,
    Stage,
    StopPanel,
    StopTransfer,
)

PANELS: dict[str, tuple[Panel, ...]] = {
    "encoder": (Panel.ENCODER,),
    "denoiser": (Panel.DENOISER,),
    "decoder": (Panel.DECODER,),
    "monolithic": (Panel.ENCODER, Panel.DENOISER, Panel.DECODER),
}
"""What each kind of instance runs, in order."""


class Phase(StrEnum):
    """Who has the work at present."""

    LOADING = "loading"
    """The transfer actor fetches staged tensors."""
    RUNNING = "running"
    """The stream worker computes it, or has it in its queue."""
    STAGING = "staging"
    """The transfer actor puts the outputs into a slot."""
    SAVING = "saving"
    """The transfer actor writes the artifact."""


_MakeReport: TypeAlias = Callable[[int], Message]
"""From the number of credits issued to the report that carries it."""
_REMEMBERED = 256


class NotTaken(Exception):  # noqa: N818  an answer to the head, not a defect
    """The work cannot be taken now; `code` is no_credit, wrong_kind, slot_gone or cancelled."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(detail)
        self.code = code


class UnexpectedEvent(Exception):  # noqa: N818  names what happened
    """An event that cannot happen to this work now: a defect of this process, which has to start anew."""

    def __init__(self, work: Work, event: str, phase: Phase | None) -> None:
        super().__init__(f"{work}: {event} while it is {phase.value if phase else 'not in hand'}")


@dataclass(slots=True)
class Item:
    """A piece of work in hand."""

    work: Work
    phase: Phase
    panels: tuple[Panel, ...]
    """Still to run, the current one first."""
    output: Output
    deadline: float
    """In seconds of this host's monotonic clock."""
    seconds: float = 0.0
    """That the last panel took."""
    seedless: bool = False
    """What it made is the same for every seed."""
    cancelled: bool = False
    returned: bool = False
    """It is stopped for others to do, not because nobody wants it."""
    began_at: float | None = None
    """When the current panel began to compute, in seconds of a monotonic clock."""
    stepped_at: float = 0.0
    step: int = 0
    total_steps: int = 0

    def left_s(self) -> float:
        """Seconds that the work will still take, as far as its pace so far says; 0 when it says nothing."""
        if self.phase is Phase.LOADING or (self.phase is Phase.RUNNING and self.began_at is None):
            return math.inf  # it waits for others, and nothing is lost when it begins elsewhere
        if self.phase is not Phase.RUNNING or self.began_at is None or not self.step:
            return 0.0
        return (self.stepped_at - self.began_at) / self.step * (self.total_steps - self.step)


class Workload:
    """The books of one incarnation of a role instance."""

    def __init__(self, instance: str, kind: str, slots: int) -> None:
        self.instance = instance
        self.kind = kind
        self.slots = slots
        self.taken = 0
        """Units of work taken so far."""
        self.ended = 0
        """Of them, those that have ended."""
        self.items: dict[Work, Item] = {}
        self.reservations: dict[Work, LeaseRef] = {}
        """Slots of the own pool that wait for a push."""
        self._cancelled: dict[Work, None] = {}
        self._ended: dict[Work, None] = {}

    @property
    def issued(self) -> int:
        """Credits issued so far: one for each slot, and one for each work that has ended."""
        return self.slots + self.ended

    @property
    def in_hand(self) -> tuple[Work, ...]:
        """Oldest first."""
        return tuple(self.items)

    # -- from the head

    def can_reserve(self, work: Work) -> bool:
        """Whether a slot may be reserved for `work`: there is a credit that no other counts on."""
        others = sum(reserved != work for reserved in self.reservations)
        return work not in self.items and len(self.items) + others < self.slots

    def reserve(self, work: Work, target: LeaseRef) -> tuple[Effect, ...]:
        """Keep a slot of the own pool for the push of `work`, in place of one reserved before.

        Raises:
            NotTaken: when the work was cancelled while the pool was asked; the slot is not kept.

        """
        if work in self._cancelled:
            raise NotTaken("cancelled", f"{work} was cancelled")
        before = self.reservations.get(work)
        self.reservations[work] = target
        return (Release(before),) if before is not None and before != target else ()

    def assign(self, message: StageAssign, now: float) -> tuple[Effect, ...]:
        """Take a unit at its first panel; nothing more happens when it is in hand already.

        Raises:
            NotTaken: when there is no slot, or this kind starts from staged tensors.

        """
        if self.kind not in ("encoder", "monolithic"):
            raise NotTaken(
                "wrong_kind",
                f"{self.instance} is a {self.kind}: it starts from staged tensors, not from inputs",
            )
        if not self._take(message.work, Phase.RUNNING, message.output, now + message.left_s):
            return ()
        return (
            *self._fence_older(message.work),
            Begin(message.work, message.inputs, message.seed),
            Run(message.work, self.items[message.work].panels[0]),
        )

    def push(self, message: TransferPush, now: float, *, spare: bool = False) -> tuple[Effect, ...]:
        """Take a unit that starts from staged tensors; nothing more happens when it is in hand already.

        Args:
            message: from the head.
            now: seconds of this host's monotonic clock.
            spare: its target was kept ready for any work.

        Raises:
            NotTaken: when there is no slot, this kind starts from inputs, or the target is kept for it no more.

        """
        if self.kind not in ("denoiser", "decoder"):
            raise NotTaken(
                "wrong_kind",
                f"{self.instance} is a {self.kind}: it starts from inputs, not from staged tensors",
            )
        kept = spare or message.target in (None, self.reservations.get(message.work))
        if not kept and not any(message.work in known for known in (self.items, self._ended, self._cancelled)):
            raise NotTaken(
                "slot_gone", f"{self.instance} no longer keeps the slot that {message.work} was to come into"
            )
        if not self._take(message.work, Phase.LOADING, message.output, now + message.left_s):
            return ()
        reserved = self.reservations.pop(message.work, None)
        unused = (Release(reserved),) if reserved is not None and reserved != message.target else ()
        return (
            *unused,
            *self._fence_older(message.work),
            Begin(message.work, {}, 0, message.renewal),
            Load(message.work, message.source, message.target, now + message.left_s),
        )

    def cancel(self, work: Work) -> tuple[Effect, ...]:
        """Stop `work` as soon as its phase allows; it will not be taken again."""
        _remember(self._cancelled, work)
        item = self.items.get(work)
        if item is None:
            target = self.reservations.pop(work, None)
            return (Release(target),) if target else ()
        if item.cancelled:
            return ()
        item.cancelled = True
        return (StopPanel(work) if item.phase is Phase.RUNNING else StopTransfer(work),)

    def hand_back(self, within_s: float | None) -> tuple[Effect, ...]:
        """Stop what would take more than `within_s` seconds, for others to do; None: all that is not computed yet."""
        effects: list[Effect] = []
        for item in tuple(self.items.values()):
            computed = item.phase in (Phase.STAGING, Phase.SAVING)
            if not (item.cancelled or computed) and (within_s is None or item.left_s() > within_s):
                item.returned = True
                effects += self.cancel(item.work)
        return tuple(effects)

    def forget_reservations(self) -> tuple[Effect, ...]:
        """Give up what a head asked for that is gone: it will ask again."""
        leases, self.reservations = tuple(self.reservations.values()), {}
        return tuple(Release(lease) for lease in leases)

    # -- from the stream worker

    def panel_started(self, work: Work, panel: Panel, now: float) -> tuple[Effect, ...]:
        """Report that the first kernel is about to run."""
        item = self._item(work, "a panel started", Phase.RUNNING)
        item.began_at, item.step, item.total_steps = now, 0, 0
        if item.cancelled:
            return ()
        return (Report(StageStarted(work, self.instance, panel)),)

    def panel_stepped(self, work: Work, step: int, total_steps: int, now: float) -> tuple[Effect, ...]:
        """Mention that a denoising step is done."""
        item = self._item(work, "a step ended", Phase.RUNNING)
        item.stepped_at, item.step, item.total_steps = now, step, total_steps
        return (Mention(StageProgress(work, step, total_steps)),)

    def panel_finished(self, work: Work, seconds: float, *, seedless: bool = False) -> tuple[Effect, ...]:
        """Run the next panel on the outputs, or stage them, or save them."""
        item = self._item(work, "a panel finished", Phase.RUNNING)
        if item.cancelled:
            return self._end_cancelled(item)
        item.seconds, item.seedless = seconds, seedless
        done, *left = item.panels
        if left:
            item.panels = tuple(left)
            return (Run(work, left[0]),)
        if done is Panel.DECODER:
            item.phase = Phase.SAVING
            return (Save(work, item.output, item.deadline),)
        item.phase = Phase.STAGING
        return (Stage(work, item.deadline),)

    def panel_failed(self, work: Work, error: str, *, at_fault: bool, certain: bool = False) -> tuple[Effect, ...]:
        """End the work: the panel raised; it is not tried again where the request is at fault or nothing changes."""
        item = self._item(work, "a panel failed", Phase.RUNNING)
        if item.cancelled:
            return self._end_cancelled(item)
        return self._end_failed(item, error, retryable=not (at_fault or certain), at_fault=at_fault)

    def panel_cancelled(self, work: Work) -> tuple[Effect, ...]:
        """End the work: the stream worker has stopped as told."""
        item = self._item(work, "a panel was cancelled", Phase.RUNNING)
        if not item.cancelled:
            raise UnexpectedEvent(work, "a panel was cancelled that was not to be", item.phase)
        return self._end_cancelled(item)

    # -- from the transfer actor

    def state_loaded(self, work: Work, seconds: float) -> tuple[Effect, ...]:
        """Run the panel on what was loaded."""
        item = self._item(work, "state was loaded", Phase.LOADING)
        if item.cancelled:
            return self._end_cancelled(item)
        item.phase = Phase.RUNNING
        return (Report(TransferReady(work, self.instance, seconds)), Run(work, item.panels[0]))

    def state_staged(self, work: Work, staged: Staged) -> tuple[Effect, ...]:
        """End the work: its outputs lie in a sealed slot."""
        item = self._item(work, "state was staged", Phase.STAGING)
        if item.cancelled:
            return (Release(staged.lease), *self._end_cancelled(item))
        panel, seconds, seedless = item.panels[0], item.seconds, item.seedless
        return self._end(
            item, lambda issued: TransferStaged(work, self.instance, panel, staged, seconds, issued, seedless)
        )

    def artifact_saved(self, work: Work, artifact: Artifact) -> tuple[Effect, ...]:
        """End the work: the file is on disk.

        One that was cancelled meanwhile is left to the store's pruning: another attempt may have written the
        same file.
        """
        item = self._item(work, "an artifact was saved", Phase.SAVING)
        if item.cancelled:
            return self._end_cancelled(item)
        return self._end(
            item,
            lambda issued: StageFinished(work, self.instance, item.panels[0], artifact, item.seconds, issued),
        )

    def state_failed(self, work: Work, reason: str, *, source_gone: bool, retryable: bool) -> tuple[Effect, ...]:
        """End the work: loading, staging or saving came to nothing."""
        item = self._item(work, "a transfer failed", Phase.LOADING, Phase.STAGING, Phase.SAVING)
        if item.cancelled:
            return self._end_cancelled(item)
        if item.phase is not Phase.LOADING:
            return self._end_failed(item, reason, retryable=retryable)
        return self._end(item, lambda issued: TransferFailed(work, self.instance, reason, source_gone, issued))

    # -- inside

    def _take(self, work: Work, phase: Phase, output: Output, deadline: float) -> bool:
        item = self.items.get(work)
        if work in self._cancelled:
            raise NotTaken("cancelled", f"{work} was cancelled")
        if item is not None or work in self._ended:  # asked again, because the answer was late
            return False
        if len(self.items) >= self.slots:
            raise NotTaken("no_credit", f"{self.instance} has {len(self.items)} works in hand and {self.slots} slots")
        self.taken += 1
        self.items[work] = Item(work, phase, PANELS[self.kind], output, deadline)
        return True

    def _fence_older(self, work: Work) -> tuple[Effect, ...]:
        """Cancel older attempts at the same unit: nobody waits for them."""
        older = [w for w in (*self.items, *self.reservations) if w.unit_id == work.unit_id and w.attempt < work.attempt]
        return tuple(effect for w in older for effect in self.cancel(w))

    def _item(self, work: Work, event: str, *phases: Phase) -> Item:
        item = self.items.get(work)
        if item is None or item.phase not in phases:
            raise UnexpectedEvent(work, event, item.phase if item else None)
        return item

    def _end(self, item: Item, report: _MakeReport) -> tuple[Effect, ...]:
        del self.items[item.work]
        self.ended += 1
        _remember(self._ended, item.work)
        return (Clear(item.work), Report(report(self.issued)))

    def _end_cancelled(self, item: Item) -> tuple[Effect, ...]:
        report = StageReturned if item.returned else StageCancelled
        return self._end(item, lambda issued: report(item.work, self.instance, issued))

    def _end_failed(self, item: Item, error: str, *, retryable: bool, at_fault: bool = False) -> tuple[Effect, ...]:
        panel = item.panels[0]
        return self._end(
            item, lambda issued: StageFailed(item.work, self.instance, panel, error, retryable, issued, at_fault)
        )


def _remember(memory: dict[Work, None], work: Work) -> None:
    memory[work] = None
    if len(memory) > _REMEMBERED:
        del memory[next(iter(memory))]
