from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from triptych.bus import Message
from triptych.engines.stages import Stage
from triptych.roles.messages.common import Artifact, Attempt, LeaseRef, Output, Rebind, StoredPayload
from triptych.roles.messages.stages import (
    StageAssign,
    StageCancelled,
    StageFailed,
    StageFinished,
    StageOutputsStored,
    StageReturned,
    StageStarted,
    TransferFailed,
    TransferPush,
    TransferReady,
)
from triptych.roles.worker import effects as do
from triptych.roles.worker.attempts import AttemptRefusedError, AttemptTracker, Phase, UnexpectedEventError

ENDS = (TransferFailed, StageOutputsStored, StageFinished, StageFailed, StageReturned, StageCancelled)
LEFT_S = 600.0
NOW = 100.0
DEADLINE = NOW + LEFT_S
ARTIFACT = Artifact("r_0.png", "image/png", 3)


def lease(number: int) -> LeaseRef:
    return LeaseRef("pool", 1, number, 4096 * number, 4096)


def stored(number: int) -> StoredPayload:
    return StoredPayload(lease(number), b"", 7, 4096)


def assign(attempt: Attempt) -> StageAssign:
    return StageAssign(attempt, {"prompt": "a red circle"}, 5, Output("png"), LEFT_S)


def push(attempt: Attempt, target: LeaseRef | None = None) -> TransferPush:
    return TransferPush(attempt, stored(1), target, Output("png"), LEFT_S)


def reports(effects: tuple[do.Effect, ...]) -> list[Message]:
    return [effect.message for effect in effects if isinstance(effect, do.Report)]


W = Attempt("r/0", 1)


def test_an_encoder_goes_from_inputs_to_a_sealed_slot() -> None:
    load = AttemptTracker("encoder-0", "encoder", 2)
    assert load.assign(assign(W), NOW) == (
        do.Begin(W, {"prompt": "a red circle"}, 5),
        do.Run(W, Stage.ENCODER),
    )
    assert (load.issued, load.taken) == (2, 1)
    assert load.run_started(W, Stage.ENCODER, 1.0) == (do.Report(StageStarted(W, "encoder-0", "encoder")),)
    assert load.run_finished(W, 0.5) == (do.Store(W, DEADLINE),)
    assert load.outputs_stored(W, stored(3)) == (
        do.Clear(W),
        do.Report(StageOutputsStored(W, "encoder-0", "encoder", stored(3), 0.5, 3)),
    )
    assert load.assigned == ()


def test_what_is_the_same_for_every_seed_is_said_to_be() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    load.run_finished(W, 0.5, seed_independent=True)
    assert reports(load.outputs_stored(W, stored(3))) == [
        StageOutputsStored(W, "encoder-0", "encoder", stored(3), 0.5, 2, seed_independent=True)
    ]


def test_what_makes_tensors_of_another_unit_its_own_comes_along() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 1)
    rebind = Rebind({"prompt": "x"}, 7)
    effects = load.push(msgspec.structs.replace(push(W), rebind=rebind), NOW)
    assert effects[0] == do.Begin(W, {}, 0, rebind)


def test_a_decoder_goes_from_a_stored_block_to_a_file() -> None:
    load = AttemptTracker("decoder-0", "decoder", 1)
    target = lease(9)
    load.reserve(W, target)
    assert load.push(push(W, target), NOW) == (do.Begin(W, {}, 0), do.Load(W, stored(1), target, DEADLINE))
    assert load.push(push(W, target), NOW) == (), "asked again"
    assert load.inputs_loaded(W, 0.1) == (
        do.Report(TransferReady(W, "decoder-0", 0.1)),
        do.Run(W, Stage.DECODER),
    )
    assert load.run_finished(W, 0.25) == (do.Save(W, Output("png"), DEADLINE),)
    assert load.artifact_saved(W, ARTIFACT) == (
        do.Clear(W),
        do.Report(StageFinished(W, "decoder-0", "decoder", ARTIFACT, 0.25, 2)),
    )


def test_a_monolithic_instance_runs_every_stage_on_the_same_values() -> None:
    load = AttemptTracker("monolithic-0", "monolithic", 1)
    assert load.assign(assign(W), NOW)[-1] == do.Run(W, Stage.ENCODER)
    assert load.run_finished(W, 0.1) == (do.Run(W, Stage.DENOISER),)
    assert load.run_started(W, Stage.DENOISER, 1.0) == (do.Report(StageStarted(W, "monolithic-0", "denoiser")),)
    assert load.run_finished(W, 0.2) == (do.Run(W, Stage.DECODER),)
    assert load.run_finished(W, 0.3) == (do.Save(W, Output("png"), DEADLINE),)
    assert reports(load.artifact_saved(W, ARTIFACT)) == [StageFinished(W, "monolithic-0", "decoder", ARTIFACT, 0.3, 2)]


def test_work_beyond_the_block_is_not_taken() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    with pytest.raises(AttemptRefusedError) as refusal:
        load.assign(assign(Attempt("r/1", 1)), NOW)
    assert refusal.value.code == "no_credit"
    assert load.taken == 1


def test_work_that_is_in_hand_already_is_taken_once() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    assert load.assign(assign(W), NOW) == ()
    assert load.taken == 1


def test_work_that_has_ended_is_not_taken_again_when_the_head_asks_again() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    load.run_failed(W, "no", invalid_request=True)
    assert load.assign(assign(W), NOW) == ()
    assert (load.taken, load.assigned) == (1, ())


@pytest.mark.parametrize("kind", ["encoder", "monolithic"])
def test_a_kind_that_starts_from_inputs_takes_no_push(kind: str) -> None:
    with pytest.raises(AttemptRefusedError, match="starts from inputs"):
        AttemptTracker("x-0", kind, 1).push(push(W), NOW)


@pytest.mark.parametrize("kind", ["denoiser", "decoder"])
def test_a_kind_that_starts_from_tensors_takes_no_inputs(kind: str) -> None:
    with pytest.raises(AttemptRefusedError, match="starts from stored tensors"):
        AttemptTracker("x-0", kind, 1).assign(assign(W), NOW)


def test_a_newer_attempt_stops_the_older_one_of_its_unit() -> None:
    load = AttemptTracker("encoder-0", "encoder", 2)
    load.assign(assign(W), NOW)
    assert do.StopRun(W) in load.assign(assign(Attempt("r/0", 2)), NOW)
    assert load.active[W].cancelled


def test_work_cancelled_before_it_came_is_not_taken() -> None:
    load = AttemptTracker("encoder-0", "encoder", 2)
    assert load.cancel(W) == ()
    with pytest.raises(AttemptRefusedError) as refusal:
        load.assign(assign(W), NOW)
    assert refusal.value.code == "cancelled"


def test_what_was_stored_for_cancelled_work_is_released() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    load.run_finished(W, 0.1)
    assert load.cancel(W) == (do.StopTransfer(W),)
    assert load.cancel(W) == ()
    assert load.outputs_stored(W, stored(3)) == (
        do.ReleaseLease(lease(3)),
        do.Clear(W),
        do.Report(StageCancelled(W, "encoder-0", 2)),
    )


def test_a_reservation_is_released_when_its_work_is_cancelled_or_its_head_is_gone() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 2)
    other = Attempt("r/1", 1)
    load.reserve(W, lease(1))
    load.reserve(other, lease(2))
    assert load.cancel(W) == (do.ReleaseLease(lease(1)),)
    assert load.drop_reservations() == (do.ReleaseLease(lease(2)),)
    assert load.reservations == {}


def test_a_reservation_belongs_to_a_credit() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 1)
    load.reserve(W, lease(1))
    assert load.can_reserve(W)
    assert not load.can_reserve(Attempt("r/1", 1))
    load.push(push(W, lease(1)), NOW)
    assert load.reservations == {}
    assert not load.can_reserve(Attempt("r/1", 1))


def test_reserving_again_releases_the_block_reserved_before() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 1)
    assert load.reserve(W, lease(1)) == ()
    assert load.reserve(W, lease(2)) == (do.ReleaseLease(lease(1)),)
    assert do.ReleaseLease(lease(2)) in load.push(push(W, lease(5)), NOW, preallocated=True)
    load.transfer_task_failed(W, "damaged", source_gone=False, retryable=True)
    assert load.push(push(W, lease(5)), NOW) == (), "asked again, because the answer was late"


def test_a_block_that_is_kept_no_more_is_not_pushed_into() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 1)
    load.reserve(W, lease(1))
    load.drop_reservations()
    with pytest.raises(AttemptRefusedError) as refusal:
        load.push(push(W, lease(1)), NOW)
    assert (refusal.value.code, load.taken) == ("block_gone", 0)


def test_a_failed_fetch_says_whether_the_source_is_gone() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 1)
    load.push(push(W), NOW)
    assert reports(load.transfer_task_failed(W, "checksum", source_gone=True, retryable=True)) == [
        TransferFailed(W, "denoiser-0", "checksum", True, 2)
    ]


@pytest.mark.parametrize(("invalid_request", "deterministic", "again"), [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_what_is_at_fault_or_certain_to_fail_is_not_tried_again(
    invalid_request: int, deterministic: int, again: int
) -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    assert reports(
        load.run_failed(W, "no", invalid_request=bool(invalid_request), deterministic=bool(deterministic))
    ) == [StageFailed(W, "encoder-0", "encoder", "no", bool(again), 2, bool(invalid_request))]


def test_a_failed_store_is_a_failed_stage() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    load.run_finished(W, 0.1)
    assert reports(load.transfer_task_failed(W, "too big", source_gone=False, retryable=False)) == [
        StageFailed(W, "encoder-0", "encoder", "too big", False, 2)
    ]


def test_an_event_that_cannot_be_is_a_defect_that_is_seen() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    with pytest.raises(UnexpectedEventError, match="not assigned"):
        load.run_finished(W, 0.1)
    load.assign(assign(W), NOW)
    with pytest.raises(UnexpectedEventError, match="running"):
        load.outputs_stored(W, stored(1))
    with pytest.raises(UnexpectedEventError, match="not to be"):
        load.run_cancelled(W)


class Life(RuleBasedStateMachine):
    """The other actors of the process, answering in any order and with any outcome that is theirs to give."""

    @initialize(kind=st.sampled_from(["encoder", "denoiser", "decoder", "monolithic"]), slots=st.integers(1, 4))
    def begin(self, kind: str, slots: int) -> None:
        self.load = AttemptTracker("x-0", kind, slots)
        self.running: dict[Attempt, do.Effect] = {}
        self.told_to_stop: set[Attempt] = set()
        self.given_back: set[Attempt] = set()
        self.open: set[Attempt] = set()
        self.ended: list[Attempt] = []
        self.taken: list[Attempt] = []
        self.serial = 0
        self.held: set[int] = set()

    def carry_out(self, effects: tuple[do.Effect, ...]) -> None:
        for effect in effects:
            match effect:
                case do.Begin(attempt):
                    assert attempt not in self.open
                    self.open.add(attempt)
                case do.Clear(attempt):
                    self.open.remove(attempt)
                case do.Load(attempt) | do.Run(attempt) | do.Store(attempt) | do.Save(attempt):
                    assert attempt not in self.running, "one actor at a time has the work"
                    assert attempt in self.open
                    self.running[attempt] = effect
                case do.StopRun(attempt) | do.StopTransfer(attempt):
                    assert isinstance(self.running[attempt], do.Run) == isinstance(effect, do.StopRun)
                    self.told_to_stop.add(attempt)
                case do.ReleaseLease(block):
                    self.held.remove(block.lease_id)
                case do.Report(message) if isinstance(message, ENDS):
                    if message.attempt in self.told_to_stop:
                        assert isinstance(
                            message, StageReturned if message.attempt in self.given_back else StageCancelled
                        )
                    self.ended.append(message.attempt)
                    if isinstance(message, StageOutputsStored):
                        self.held.remove(message.stored.lease.lease_id)  # the request's from here on
                case _:
                    pass

    def number(self) -> int:
        self.serial += 1
        self.held.add(self.serial)
        return self.serial

    @rule(job=st.integers(0, 3), number=st.integers(1, 3))
    def offer(self, job: int, number: int) -> None:
        attempt = Attempt(f"r/{job}", number)
        fresh = attempt not in self.taken
        try:
            inputs = self.load.kind in ("encoder", "monolithic")
            effects = self.load.assign(assign(attempt), NOW) if inputs else self.load.push(push(attempt), NOW)
        except AttemptRefusedError:
            return
        if fresh:
            self.taken.append(attempt)
        self.carry_out(effects)

    @rule(job=st.integers(0, 3), number=st.integers(1, 3))
    def reserve(self, job: int, number: int) -> None:
        attempt = Attempt(f"r/{job}", number)
        if self.load.can_reserve(attempt):
            block = lease(self.number())
            try:
                self.carry_out(self.load.reserve(attempt, block))
            except AttemptRefusedError:
                self.held.remove(block.lease_id)

    @rule()
    def head_gone(self) -> None:
        self.carry_out(self.load.drop_reservations())

    @precondition(lambda self: self.load.active)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.carry_out(self.load.cancel(data.draw(st.sampled_from(list(self.load.active)))))

    @precondition(lambda self: self.load.active)
    @rule(within_s=st.sampled_from([None, 0.0, 10.0]))
    def return_to_head(self, within_s: float | None) -> None:
        stopped = {item.attempt for item in self.load.active.values() if item.cancelled}
        effects = self.load.return_to_head(within_s)
        self.given_back |= {item.attempt for item in self.load.active.values() if item.cancelled} - stopped
        self.carry_out(effects)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), outcome=st.sampled_from(["done", "failed", "cancelled"]))
    def answer(self, data: st.DataObject, outcome: str) -> None:
        self.finish(data.draw(st.sampled_from(list(self.running))), outcome)

    def finish(self, attempt: Attempt, outcome: str) -> None:
        load = self.load
        match self.running.pop(attempt), outcome:
            case do.Run(_, stage), "done":
                self.carry_out(load.run_started(attempt, stage, 1.0))
                self.carry_out(load.run_stepped(attempt, 1, 1, 2.0))
                self.carry_out(load.run_finished(attempt, 0.1))
            case do.Run(), "cancelled" if attempt in self.told_to_stop:
                self.carry_out(load.run_cancelled(attempt))
            case do.Run(), _:
                self.carry_out(load.run_failed(attempt, "ValueError: no", invalid_request=True))
            case do.Load(), "done":
                self.carry_out(load.inputs_loaded(attempt, 0.1))
            case do.Store(), "done":
                self.carry_out(load.outputs_stored(attempt, stored(self.number())))
            case do.Save(), "done":
                self.carry_out(load.artifact_saved(attempt, ARTIFACT))
            case _:
                self.carry_out(load.transfer_task_failed(attempt, "no", source_gone=False, retryable=True))

    @invariant()
    def credits_are_kept(self) -> None:
        load = self.load
        assert len(load.active) <= load.slots
        assert load.issued - load.taken == load.slots - len(load.active)
        assert load.taken == len(self.taken)

    @invariant()
    def every_attempt_assigned_is_with_somebody(self) -> None:
        assert set(self.running) == set(self.load.active) == self.open

    def teardown(self) -> None:
        if not hasattr(self, "load"):
            return
        for attempt in list(self.load.active):
            self.carry_out(self.load.cancel(attempt))
        while self.running:
            self.finish(next(iter(self.running)), "done")
        self.carry_out(self.load.drop_reservations())
        assert not self.load.active
        assert sorted(map(str, self.ended)) == sorted(map(str, self.taken)), "each ends exactly once"
        assert not self.held, "no block is left behind"


Life.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestLife = Life.TestCase


def test_who_has_to_end_gives_back_what_will_not_be_done_in_time() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 4)
    slow, quick, new, queued = (Attempt(f"r/{k}", 1) for k in range(4))
    for attempt in (slow, quick, new, queued):
        load.push(push(attempt), NOW)
        load.inputs_loaded(attempt, 0.1)
    for attempt, steps in ((slow, 60), (quick, 4)):
        load.run_started(attempt, Stage.DENOISER, 100.0)
        load.run_stepped(attempt, 2, steps, 102.0)
    load.run_started(new, Stage.DENOISER, 102.0)
    assert [load.active[attempt].left_s() for attempt in (slow, quick, new, queued)] == [58.0, 2.0, 0.0, math.inf]
    assert load.return_to_head(10.0) == (do.StopRun(slow), do.StopRun(queued))
    assert reports(load.run_cancelled(slow)) == [StageReturned(slow, "denoiser-0", 5)]
    load.run_finished(quick, 2.0)
    assert load.return_to_head(None) == (do.StopRun(new),), "what is computed is stored yet"
    with pytest.raises(AttemptRefusedError):
        load.push(push(slow), NOW)


@pytest.mark.parametrize("phase", list(Phase))
def test_cancel_ends_in_stage_cancelled_in_any_phase(phase: Phase) -> None:
    load = AttemptTracker("x-0", "encoder" if phase is Phase.STORING else "decoder", 1)
    if phase is Phase.STORING:
        load.assign(assign(W), NOW)
        load.run_finished(W, 0.1)
    else:
        load.push(push(W), NOW)
    if phase in (Phase.RUNNING, Phase.SAVING):
        load.inputs_loaded(W, 0.1)
    if phase is Phase.SAVING:
        load.run_finished(W, 0.1)
    assert load.active[W].phase is phase
    load.cancel(W)
    ending = {
        Phase.LOADING: lambda: load.inputs_loaded(W, 0.1),
        Phase.RUNNING: lambda: load.run_finished(W, 0.1),
        Phase.STORING: lambda: load.outputs_stored(W, stored(1)),
        Phase.SAVING: lambda: load.artifact_saved(W, ARTIFACT),
    }[phase]
    assert reports(ending()) == [StageCancelled(W, "x-0", 2)]
