from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from triptych.bus import Message
from triptych.engines.panels import Panel
from triptych.roles import workload_effects as do
from triptych.roles.messages.stages import (
    StageAssign,
    StageCancelled,
    StageFailed,
    StageFinished,
    StageReturned,
    StageStarted,
    TransferFailed,
    TransferPush,
    TransferReady,
    TransferStaged,
)
from triptych.roles.messages.work import Artifact, LeaseRef, Output, Renewal, Staged, Work
from triptych.roles.workload import NotTaken, Phase, UnexpectedEvent, Workload

ENDS = (TransferFailed, TransferStaged, StageFinished, StageFailed, StageReturned, StageCancelled)
LEFT_S = 600.0
NOW = 100.0
DEADLINE = NOW + LEFT_S
ARTIFACT = Artifact("r_0.png", "image/png", 3)


def lease(number: int) -> LeaseRef:
    return LeaseRef("pool", 1, number, 4096 * number, 4096)


def staged(number: int) -> Staged:
    return Staged(lease(number), b"", 7, 4096)


def assign(work: Work) -> StageAssign:
    return StageAssign(work, {"prompt": "a red circle"}, 5, Output("png"), LEFT_S)


def push(work: Work, target: LeaseRef | None = None) -> TransferPush:
    return TransferPush(work, staged(1), target, Output("png"), LEFT_S)


def reports(effects: tuple[do.Effect, ...]) -> list[Message]:
    return [effect.message for effect in effects if isinstance(effect, do.Report)]


W = Work("r/0", 1)


def test_an_encoder_goes_from_inputs_to_a_sealed_slot() -> None:
    load = Workload("encoder-0", "encoder", 2)
    assert load.assign(assign(W), NOW) == (
        do.Begin(W, {"prompt": "a red circle"}, 5),
        do.Run(W, Panel.ENCODER),
    )
    assert (load.issued, load.taken) == (2, 1)
    assert load.panel_started(W, Panel.ENCODER, 1.0) == (do.Report(StageStarted(W, "encoder-0", "encoder")),)
    assert load.panel_finished(W, 0.5) == (do.Stage(W, DEADLINE),)
    assert load.state_staged(W, staged(3)) == (
        do.Clear(W),
        do.Report(TransferStaged(W, "encoder-0", "encoder", staged(3), 0.5, 3)),
    )
    assert load.in_hand == ()


def test_what_is_the_same_for_every_seed_is_said_to_be() -> None:
    load = Workload("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    load.panel_finished(W, 0.5, seedless=True)
    assert reports(load.state_staged(W, staged(3))) == [
        TransferStaged(W, "encoder-0", "encoder", staged(3), 0.5, 2, seedless=True)
    ]


def test_what_makes_tensors_of_another_unit_its_own_comes_along() -> None:
    load = Workload("denoiser-0", "denoiser", 1)
    renewal = Renewal({"prompt": "x"}, 7)
    effects = load.push(msgspec.structs.replace(push(W), renewal=renewal), NOW)
    assert effects[0] == do.Begin(W, {}, 0, renewal)


def test_a_decoder_goes_from_a_staged_slot_to_a_file() -> None:
    load = Workload("decoder-0", "decoder", 1)
    target = lease(9)
    load.reserve(W, target)
    assert load.push(push(W, target), NOW) == (do.Begin(W, {}, 0), do.Load(W, staged(1), target, DEADLINE))
    assert load.push(push(W, target), NOW) == (), "asked again"
    assert load.state_loaded(W, 0.1) == (
        do.Report(TransferReady(W, "decoder-0", 0.1)),
        do.Run(W, Panel.DECODER),
    )
    assert load.panel_finished(W, 0.25) == (do.Save(W, Output("png"), DEADLINE),)
    assert load.artifact_saved(W, ARTIFACT) == (
        do.Clear(W),
        do.Report(StageFinished(W, "decoder-0", "decoder", ARTIFACT, 0.25, 2)),
    )


def test_a_monolithic_instance_runs_every_panel_on_the_same_values() -> None:
    load = Workload("monolithic-0", "monolithic", 1)
    assert load.assign(assign(W), NOW)[-1] == do.Run(W, Panel.ENCODER)
    assert load.panel_finished(W, 0.1) == (do.Run(W, Panel.DENOISER),)
    assert load.panel_started(W, Panel.DENOISER, 1.0) == (do.Report(StageStarted(W, "monolithic-0", "denoiser")),)
    assert load.panel_finished(W, 0.2) == (do.Run(W, Panel.DECODER),)
    assert load.panel_finished(W, 0.3) == (do.Save(W, Output("png"), DEADLINE),)
    assert reports(load.artifact_saved(W, ARTIFACT)) == [StageFinished(W, "monolithic-0", "decoder", ARTIFACT, 0.3, 2)]


def test_work_beyond_the_slots_is_not_taken() -> None:
    load = Workload("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    with pytest.raises(NotTaken) as refusal:
        load.assign(assign(Work("r/1", 1)), NOW)
    assert refusal.value.code == "no_credit"
    assert load.taken == 1


def test_work_that_is_in_hand_already_is_taken_once() -> None:
    load = Workload("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    assert load.assign(assign(W), NOW) == ()
    assert load.taken == 1


def test_work_that_has_ended_is_not_taken_again_when_the_head_asks_again() -> None:
    load = Workload("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    load.panel_failed(W, "no", at_fault=True)
    assert load.assign(assign(W), NOW) == ()
    assert (load.taken, load.in_hand) == (1, ())


@pytest.mark.parametrize("kind", ["encoder", "monolithic"])
def test_a_kind_that_starts_from_inputs_takes_no_push(kind: str) -> None:
    with pytest.raises(NotTaken, match="starts from inputs"):
        Workload("x-0", kind, 1).push(push(W), NOW)


@pytest.mark.parametrize("kind", ["denoiser", "decoder"])
def test_a_kind_that_starts_from_tensors_takes_no_inputs(kind: str) -> None:
    with pytest.raises(NotTaken, match="starts from staged tensors"):
        Workload("x-0", kind, 1).assign(assign(W), NOW)


def test_a_newer_attempt_stops_the_older_one_of_its_unit() -> None:
    load = Workload("encoder-0", "encoder", 2)
    load.assign(assign(W), NOW)
    assert do.StopPanel(W) in load.assign(assign(Work("r/0", 2)), NOW)
    assert load.items[W].cancelled


def test_work_cancelled_before_it_came_is_not_taken() -> None:
    load = Workload("encoder-0", "encoder", 2)
    assert load.cancel(W) == ()
    with pytest.raises(NotTaken) as refusal:
        load.assign(assign(W), NOW)
    assert refusal.value.code == "cancelled"


def test_what_was_staged_for_cancelled_work_is_released() -> None:
    load = Workload("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    load.panel_finished(W, 0.1)
    assert load.cancel(W) == (do.StopTransfer(W),)
    assert load.cancel(W) == ()
    assert load.state_staged(W, staged(3)) == (
        do.Release(lease(3)),
        do.Clear(W),
        do.Report(StageCancelled(W, "encoder-0", 2)),
    )


def test_a_reservation_is_released_when_its_work_is_cancelled_or_its_head_is_gone() -> None:
    load = Workload("denoiser-0", "denoiser", 2)
    other = Work("r/1", 1)
    load.reserve(W, lease(1))
    load.reserve(other, lease(2))
    assert load.cancel(W) == (do.Release(lease(1)),)
    assert load.forget_reservations() == (do.Release(lease(2)),)
    assert load.reservations == {}


def test_a_reservation_belongs_to_a_credit() -> None:
    load = Workload("denoiser-0", "denoiser", 1)
    load.reserve(W, lease(1))
    assert load.can_reserve(W)
    assert not load.can_reserve(Work("r/1", 1))
    load.push(push(W, lease(1)), NOW)
    assert load.reservations == {}
    assert not load.can_reserve(Work("r/1", 1))


def test_reserving_again_releases_the_slot_reserved_before() -> None:
    load = Workload("denoiser-0", "denoiser", 1)
    assert load.reserve(W, lease(1)) == ()
    assert load.reserve(W, lease(2)) == (do.Release(lease(1)),)
    assert do.Release(lease(2)) in load.push(push(W, lease(5)), NOW, spare=True)
    load.state_failed(W, "damaged", source_gone=False, retryable=True)
    assert load.push(push(W, lease(5)), NOW) == (), "asked again, because the answer was late"


def test_a_slot_that_is_kept_no_more_is_not_pushed_into() -> None:
    load = Workload("denoiser-0", "denoiser", 1)
    load.reserve(W, lease(1))
    load.forget_reservations()
    with pytest.raises(NotTaken) as refusal:
        load.push(push(W, lease(1)), NOW)
    assert (refusal.value.code, load.taken) == ("slot_gone", 0)


def test_a_failed_fetch_says_whether_the_source_is_gone() -> None:
    load = Workload("denoiser-0", "denoiser", 1)
    load.push(push(W), NOW)
    assert reports(load.state_failed(W, "checksum", source_gone=True, retryable=True)) == [
        TransferFailed(W, "denoiser-0", "checksum", True, 2)
    ]


@pytest.mark.parametrize(("at_fault", "certain", "again"), [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_what_is_at_fault_or_certain_to_fail_is_not_tried_again(at_fault: int, certain: int, again: int) -> None:
    load = Workload("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    assert reports(load.panel_failed(W, "no", at_fault=bool(at_fault), certain=bool(certain))) == [
        StageFailed(W, "encoder-0", "encoder", "no", bool(again), 2, bool(at_fault))
    ]


def test_a_failed_staging_is_a_failed_stage() -> None:
    load = Workload("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    load.panel_finished(W, 0.1)
    assert reports(load.state_failed(W, "too big", source_gone=False, retryable=False)) == [
        StageFailed(W, "encoder-0", "encoder", "too big", False, 2)
    ]


def test_an_event_that_cannot_be_is_a_defect_that_is_seen() -> None:
    load = Workload("encoder-0", "encoder", 1)
    with pytest.raises(UnexpectedEvent, match="not in hand"):
        load.panel_finished(W, 0.1)
    load.assign(assign(W), NOW)
    with pytest.raises(UnexpectedEvent, match="running"):
        load.state_staged(W, staged(1))
    with pytest.raises(UnexpectedEvent, match="not to be"):
        load.panel_cancelled(W)


class Life(RuleBasedStateMachine):
    """The other actors of the process, answering in any order and with any outcome that is theirs to give."""

    @initialize(kind=st.sampled_from(["encoder", "denoiser", "decoder", "monolithic"]), slots=st.integers(1, 4))
    def begin(self, kind: str, slots: int) -> None:
        self.load = Workload("x-0", kind, slots)
        self.jobs: dict[Work, do.Effect] = {}
        self.told_to_stop: set[Work] = set()
        self.given_back: set[Work] = set()
        self.open: set[Work] = set()
        self.ended: list[Work] = []
        self.taken: list[Work] = []
        self.serial = 0
        self.held: set[int] = set()

    def carry_out(self, effects: tuple[do.Effect, ...]) -> None:
        for effect in effects:
            match effect:
                case do.Begin(work):
                    assert work not in self.open
                    self.open.add(work)
                case do.Clear(work):
                    self.open.remove(work)
                case do.Load(work) | do.Run(work) | do.Stage(work) | do.Save(work):
                    assert work not in self.jobs, "one actor at a time has the work"
                    assert work in self.open
                    self.jobs[work] = effect
                case do.StopPanel(work) | do.StopTransfer(work):
                    assert isinstance(self.jobs[work], do.Run) == isinstance(effect, do.StopPanel)
                    self.told_to_stop.add(work)
                case do.Release(slot):
                    self.held.remove(slot.lease_id)
                case do.Report(message) if isinstance(message, ENDS):
                    if message.work in self.told_to_stop:
                        assert isinstance(message, StageReturned if message.work in self.given_back else StageCancelled)
                    self.ended.append(message.work)
                    if isinstance(message, TransferStaged):
                        self.held.remove(message.staged.lease.lease_id)  # the request's from here on
                case _:
                    pass

    def number(self) -> int:
        self.serial += 1
        self.held.add(self.serial)
        return self.serial

    @rule(unit=st.integers(0, 3), attempt=st.integers(1, 3))
    def offer(self, unit: int, attempt: int) -> None:
        work = Work(f"r/{unit}", attempt)
        fresh = work not in self.taken
        try:
            inputs = self.load.kind in ("encoder", "monolithic")
            effects = self.load.assign(assign(work), NOW) if inputs else self.load.push(push(work), NOW)
        except NotTaken:
            return
        if fresh:
            self.taken.append(work)
        self.carry_out(effects)

    @rule(unit=st.integers(0, 3), attempt=st.integers(1, 3))
    def reserve(self, unit: int, attempt: int) -> None:
        work = Work(f"r/{unit}", attempt)
        if self.load.can_reserve(work):
            slot = lease(self.number())
            try:
                self.carry_out(self.load.reserve(work, slot))
            except NotTaken:
                self.held.remove(slot.lease_id)

    @rule()
    def head_gone(self) -> None:
        self.carry_out(self.load.forget_reservations())

    @precondition(lambda self: self.load.items)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.carry_out(self.load.cancel(data.draw(st.sampled_from(list(self.load.items)))))

    @precondition(lambda self: self.load.items)
    @rule(within_s=st.sampled_from([None, 0.0, 10.0]))
    def hand_back(self, within_s: float | None) -> None:
        stopped = {item.work for item in self.load.items.values() if item.cancelled}
        effects = self.load.hand_back(within_s)
        self.given_back |= {item.work for item in self.load.items.values() if item.cancelled} - stopped
        self.carry_out(effects)

    @precondition(lambda self: self.jobs)
    @rule(data=st.data(), outcome=st.sampled_from(["done", "failed", "cancelled"]))
    def answer(self, data: st.DataObject, outcome: str) -> None:
        self.finish(data.draw(st.sampled_from(list(self.jobs))), outcome)

    def finish(self, work: Work, outcome: str) -> None:
        load = self.load
        match self.jobs.pop(work), outcome:
            case do.Run(_, panel), "done":
                self.carry_out(load.panel_started(work, panel, 1.0))
                self.carry_out(load.panel_stepped(work, 1, 1, 2.0))
                self.carry_out(load.panel_finished(work, 0.1))
            case do.Run(), "cancelled" if work in self.told_to_stop:
                self.carry_out(load.panel_cancelled(work))
            case do.Run(), _:
                self.carry_out(load.panel_failed(work, "ValueError: no", at_fault=True))
            case do.Load(), "done":
                self.carry_out(load.state_loaded(work, 0.1))
            case do.Stage(), "done":
                self.carry_out(load.state_staged(work, staged(self.number())))
            case do.Save(), "done":
                self.carry_out(load.artifact_saved(work, ARTIFACT))
            case _:
                self.carry_out(load.state_failed(work, "no", source_gone=False, retryable=True))

    @invariant()
    def credits_are_kept(self) -> None:
        load = self.load
        assert len(load.items) <= load.slots
        assert load.issued - load.taken == load.slots - len(load.items)
        assert load.taken == len(self.taken)

    @invariant()
    def every_work_in_hand_is_in_somebodys_hands(self) -> None:
        assert set(self.jobs) == set(self.load.items) == self.open

    def teardown(self) -> None:
        if not hasattr(self, "load"):
            return
        for work in list(self.load.items):
            self.carry_out(self.load.cancel(work))
        while self.jobs:
            self.finish(next(iter(self.jobs)), "done")
        self.carry_out(self.load.forget_reservations())
        assert not self.load.items
        assert sorted(map(str, self.ended)) == sorted(map(str, self.taken)), "each ends exactly once"
        assert not self.held, "no slot is left behind"


Life.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase


def test_who_has_to_end_gives_back_what_will_not_be_done_in_time() -> None:
    load = Workload("denoiser-0", "denoiser", 4)
    slow, quick, new, queued = (Work(f"r/{k}", 1) for k in range(4))
    for work in (slow, quick, new, queued):
        load.push(push(work), NOW)
        load.state_loaded(work, 0.1)
    for work, steps in ((slow, 60), (quick, 4)):
        load.panel_started(work, Panel.DENOISER, 100.0)
        load.panel_stepped(work, 2, steps, 102.0)
    load.panel_started(new, Panel.DENOISER, 102.0)
    assert [load.items[work].left_s() for work in (slow, quick, new, queued)] == [58.0, 2.0, 0.0, math.inf]
    assert load.hand_back(10.0) == (do.StopPanel(slow), do.StopPanel(queued))
    assert reports(load.panel_cancelled(slow)) == [StageReturned(slow, "denoiser-0", 5)]
    load.panel_finished(quick, 2.0)
    assert load.hand_back(None) == (do.StopPanel(new),), "what is computed is staged yet"
    with pytest.raises(NotTaken):
        load.push(push(slow), NOW)


@pytest.mark.parametrize("phase", list(Phase))
def test_cancel_ends_in_stage_cancelled_in_any_phase(phase: Phase) -> None:
    load = Workload("x-0", "encoder" if phase is Phase.STAGING else "decoder", 1)
    if phase is Phase.STAGING:
        load.assign(assign(W), NOW)
        load.panel_finished(W, 0.1)
    else:
        load.push(push(W), NOW)
    if phase in (Phase.RUNNING, Phase.SAVING):
        load.state_loaded(W, 0.1)
    if phase is Phase.SAVING:
        load.panel_finished(W, 0.1)
    assert load.items[W].phase is phase
    load.cancel(W)
    ending = {
        Phase.LOADING: lambda: load.state_loaded(W, 0.1),
        Phase.RUNNING: lambda: load.panel_finished(W, 0.1),
        Phase.STAGING: lambda: load.state_staged(W, staged(1)),
        Phase.SAVING: lambda: load.artifact_saved(W, ARTIFACT),
    }[phase]
    assert reports(ending()) == [StageCancelled(W, "x-0", 2)]
