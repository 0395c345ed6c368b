from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from triptych.bus import Message
from triptych.engines.memory.streams import StreamEvent
from triptych.engines.stages import Stage
from triptych.roles.messages.common import (
    Artifact,
    Attempt,
    Images,
    LeaseRef,
    Output,
    Provenance,
    Rebind,
    SchedulingHints,
    StoredPayload,
    Upload,
)
from triptych.roles.messages.pool import ReleaseBlocks
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
)
from triptych.roles.messages.worker import (
    CancelAttempt,
    FetchUploads,
    LoadInputs,
    RunStage,
    SaveArtifact,
    StoreOutputs,
)
from triptych.roles.worker.attempts import AttemptRefusedError, AttemptTracker, Phase, Snapshot, UnexpectedEventError

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


def release(number: int) -> ReleaseBlocks:
    return ReleaseBlocks((lease(number),))


W = Attempt("r/0", 1)


def test_an_encoder_goes_from_inputs_to_a_sealed_block() -> None:
    load = AttemptTracker("encoder-0", "encoder", 2)
    assert load.assign(assign(W), NOW) == (RunStage(W, Stage.ENCODER),)
    assert (load.issued, load.taken) == (2, 1)
    assert (load.active[W].values, load.active[W].seed) == ({"prompt": "a red circle"}, 5)
    assert load.started(W, Stage.ENCODER, 1.0) == StageStarted(W, Stage.ENCODER)
    assert load.computed(W, 0.5) == StoreOutputs(W, DEADLINE)
    report = load.stored(W, stored(3))
    assert load.end(report) == (StageOutputsStored(W, Stage.ENCODER, stored(3), 0.5, 3),)
    assert load.assigned == ()


def test_what_is_the_same_for_every_seed_is_said_to_be() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    load.computed(W, 0.5, seed_independent=True)
    assert load.stored(W, stored(3)).seed_independent


def test_the_seed_and_inputs_that_adapt_cached_outputs_come_along() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 1)
    rebind = Rebind({"prompt": "x"}, 7)
    load.push(msgspec.structs.replace(push(W), rebind=rebind), NOW)
    assert load.active[W].rebind == rebind


def test_hints_come_with_an_attempt_and_its_deadline_is_of_this_hosts_clock() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 2)
    hints = SchedulingHints(priority=2, due_s=-5.0, steps=30, bucket=4)
    load.push(msgspec.structs.replace(push(W), hints=hints), NOW)
    load.push(push(Attempt("r/1", 1)), NOW)
    assert [(item.hints, item.due) for item in load.active.values()] == [
        (hints, NOW - 5.0),
        (SchedulingHints(), math.inf),
    ]


def test_a_decoder_goes_from_a_stored_block_to_a_file() -> None:
    load = AttemptTracker("decoder-0", "decoder", 1)
    target = lease(9)
    load.reserve(W, target)
    assert load.push(push(W, target), NOW) == (LoadInputs(W, stored(1), target, DEADLINE),)
    assert load.push(push(W, target), NOW) == (), "asked again"
    assert load.loaded(W, NOW) == RunStage(W, Stage.DECODER)
    assert load.computed(W, 0.25) == SaveArtifact(W, Output("png"), DEADLINE)
    assert load.end(load.saved(W, ARTIFACT)) == (StageFinished(W, Stage.DECODER, ARTIFACT, 0.25, 2),)


def test_a_monolithic_instance_runs_every_stage_on_the_same_values() -> None:
    load = AttemptTracker("monolithic-0", "monolithic", 1)
    assert load.assign(assign(W), NOW) == (RunStage(W, Stage.ENCODER),)
    assert load.computed(W, 0.1) == RunStage(W, Stage.DENOISER)
    assert load.started(W, Stage.DENOISER, 1.0) == StageStarted(W, Stage.DENOISER)
    assert load.computed(W, 0.2) == RunStage(W, Stage.DECODER)
    assert load.computed(W, 0.3) == SaveArtifact(W, Output("png"), DEADLINE)
    assert load.end(load.saved(W, ARTIFACT)) == (StageFinished(W, Stage.DECODER, ARTIFACT, 0.3, 2),)


def test_what_a_file_is_made_from_goes_to_who_writes_it() -> None:
    made = Provenance("shapes", {"prompt": "a red circle"}, 5)
    decoder = AttemptTracker("decoder-0", "decoder", 1)
    decoder.push(msgspec.structs.replace(push(W), provenance=made), NOW)
    decoder.loaded(W, NOW)
    assert decoder.computed(W, 0.1) == SaveArtifact(W, Output("png"), DEADLINE, made)
    alone = AttemptTracker("monolithic-0", "monolithic", 2)
    output = Output("png", metadata=True)
    alone.assign(msgspec.structs.replace(assign(W), output=output, model="shapes"), NOW)
    for seconds in (0.1, 0.2):
        alone.computed(W, seconds)
    assert alone.computed(W, 0.3) == SaveArtifact(W, output, DEADLINE, made)
    encoder = AttemptTracker("encoder-0", "encoder", 1)
    encoder.assign(msgspec.structs.replace(assign(W), output=output, model="shapes"), NOW)
    assert encoder.active[W].provenance is None, "it writes no file"


def test_an_attempt_beyond_the_slots_is_not_taken() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    with pytest.raises(AttemptRefusedError) as refusal:
        load.assign(assign(Attempt("r/1", 1)), NOW)
    assert refusal.value.code == "no_credit"
    assert load.taken == 1


def test_an_attempt_that_is_already_assigned_is_taken_once() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    assert load.assign(assign(W), NOW) == ()
    assert load.taken == 1


def test_an_attempt_that_has_ended_is_not_taken_again_when_the_head_asks_again() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    load.end(load.stage_failed(W, "no", invalid_request=True))
    assert load.assign(assign(W), NOW) == ()
    assert (load.taken, load.assigned) == (1, ())


def test_an_id_that_a_deleted_request_had_is_taken_as_a_new_one() -> None:
    load = AttemptTracker("encoder-0", "encoder", 2)
    first, second = (msgspec.structs.replace(assign(W), accepted_at=at) for at in (1.0, 2.0))
    load.assign(first, NOW)
    with pytest.raises(AttemptRefusedError, match="has not ended"):
        load.assign(second, NOW)
    load.end(StageFailed(W, Stage.ENCODER, "boom", True, 0))
    assert load.assign(second, NOW) == (RunStage(W, Stage.ENCODER),)
    assert (load.assign(second, NOW), load.taken) == ((), 2)


@pytest.mark.parametrize("kind", ["encoder", "monolithic"])
def test_a_role_that_starts_from_inputs_takes_no_push(kind: str) -> None:
    with pytest.raises(AttemptRefusedError, match="starts from inputs"):
        AttemptTracker("x-0", kind, 1).push(push(W), NOW)


@pytest.mark.parametrize("kind", ["denoiser", "decoder"])
def test_a_role_that_starts_from_tensors_takes_no_inputs(kind: str) -> None:
    with pytest.raises(AttemptRefusedError, match="starts from stored tensors"):
        AttemptTracker("x-0", kind, 1).assign(assign(W), NOW)


def test_a_newer_attempt_stops_the_older_one_of_its_job() -> None:
    load = AttemptTracker("encoder-0", "encoder", 2)
    load.assign(assign(W), NOW)
    assert CancelAttempt(W) in load.assign(assign(Attempt("r/0", 2)), NOW)
    assert load.active[W].cancelled


def test_an_attempt_cancelled_before_it_came_is_not_taken() -> None:
    load = AttemptTracker("encoder-0", "encoder", 2)
    assert load.cancel(W) == ()
    with pytest.raises(AttemptRefusedError) as refusal:
        load.assign(assign(W), NOW)
    assert refusal.value.code == "cancelled"


def test_what_was_stored_for_a_cancelled_attempt_is_released() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    load.computed(W, 0.1)
    assert load.cancel(W) == (CancelAttempt(W),)
    assert load.cancel(W) == ()
    assert load.end(load.stored(W, stored(3))) == (release(3), StageCancelled(W, 2))


def test_a_block_leased_ahead_that_is_not_used_is_released_at_the_end() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    load.active[W].block = lease(4)
    failed = load.stage_failed(W, "no", invalid_request=False)
    assert load.end(failed) == (release(4), msgspec.structs.replace(failed, issued=2))


def test_a_reservation_is_released_when_its_attempt_is_cancelled_or_its_head_is_gone() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 2)
    other = Attempt("r/1", 1)
    load.reserve(W, lease(1))
    load.reserve(other, lease(2))
    assert load.cancel(W) == (release(1),)
    assert load.drop_reservations() == (release(2),)
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
    assert load.reserve(W, lease(2)) == (release(1),)
    assert release(2) in load.push(push(W, lease(5)), NOW, preallocated=True)
    load.end(load.transfer_failed(W, "damaged"))
    assert load.push(push(W, lease(5)), NOW) == (), "asked again, because the answer was late"


def test_a_block_that_is_no_longer_preallocated_is_not_pushed_into() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 1)
    load.reserve(W, lease(1))
    load.drop_reservations()
    with pytest.raises(AttemptRefusedError) as refusal:
        load.push(push(W, lease(1)), NOW)
    assert (refusal.value.code, load.taken) == ("block_gone", 0)


def test_a_failed_fetch_says_whether_the_source_is_gone() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 1)
    load.push(push(W), NOW)
    report = load.transfer_failed(W, "checksum", source_gone=True)
    assert load.end(report) == (TransferFailed(W, "checksum", True, 2),)


@pytest.mark.parametrize(("invalid_request", "deterministic", "again"), [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_what_is_at_fault_or_certain_to_fail_is_not_tried_again(
    invalid_request: int, deterministic: int, again: int
) -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    report = load.stage_failed(W, "no", invalid_request=bool(invalid_request), deterministic=bool(deterministic))
    assert load.end(report) == (StageFailed(W, Stage.ENCODER, "no", bool(again), 2, bool(invalid_request)),)


def test_a_failed_store_is_a_failed_stage() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    load.assign(assign(W), NOW)
    load.computed(W, 0.1)
    report = load.transfer_failed(W, "too big", retryable=False)
    assert load.end(report) == (StageFailed(W, Stage.ENCODER, "too big", False, 2),)


def test_an_event_that_cannot_be_is_a_defect_that_is_seen() -> None:
    load = AttemptTracker("encoder-0", "encoder", 1)
    with pytest.raises(UnexpectedEventError, match="not assigned"):
        load.computed(W, 0.1)
    load.assign(assign(W), NOW)
    with pytest.raises(UnexpectedEventError, match="running"):
        load.stored(W, stored(1))
    with pytest.raises(UnexpectedEventError, match="not to be"):
        load.stopped(W)
    report = load.stage_failed(W, "no", invalid_request=True)
    load.end(report)
    with pytest.raises(UnexpectedEventError, match="not assigned"):
        load.end(report)


class Life(RuleBasedStateMachine):
    """The actors of the process, passing attempts on in any order and with any outcome that is theirs to give."""

    @initialize(kind=st.sampled_from(["encoder", "denoiser", "decoder", "monolithic"]), slots=st.integers(1, 4))
    def begin(self, kind: str, slots: int) -> None:
        self.load = AttemptTracker("x-0", kind, slots)
        self.running: dict[Attempt, Message] = {}
        """What an actor has been told and has not passed on; the report of an end waits for the instance."""
        self.told_to_stop: set[Attempt] = set()
        self.given_back: set[Attempt] = set()
        self.ended: list[Attempt] = []
        self.taken: list[Attempt] = []
        self.serial = 0
        self.held: set[int] = set()

    def carry_out(self, messages: tuple[Message, ...]) -> None:
        for message in messages:
            match message:
                case LoadInputs(attempt) | RunStage(attempt) | StoreOutputs(attempt) | SaveArtifact(attempt):
                    assert attempt not in self.running, "one actor at a time has the attempt"
                    assert attempt in self.load.active
                    self.running[attempt] = message
                case CancelAttempt(attempt):
                    assert self.load.active[attempt].cancelled
                    self.told_to_stop.add(attempt)
                case ReleaseBlocks(leases):
                    for block in leases:
                        self.held.remove(block.lease_id)
                case _:
                    assert isinstance(message, ENDS)
                    if message.attempt in self.told_to_stop:
                        assert isinstance(
                            message, StageReturned if message.attempt in self.given_back else StageCancelled
                        )
                    assert message.issued == self.load.issued
                    self.ended.append(message.attempt)
                    if isinstance(message, StageOutputsStored):
                        self.held.remove(message.stored.lease.lease_id)  # the request's from here on

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
    @precondition(lambda self: self.load.active)
    @rule(data=st.data(), stored=st.booleans())
    def park(self, data: st.DataObject, stored: bool) -> None:
        item = data.draw(st.sampled_from(list(self.load.active.values())))
        stopped = item.cancelled
        self.carry_out(self.load.park(item.attempt))
        self.carry_out(self.load.checkpoint_ended(item.attempt, stored=stored))
        if item.cancelled and not stopped:
            self.given_back.add(item.attempt)

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
            case message, _ if isinstance(message, ENDS):
                self.carry_out(load.end(message))
                return
            case RunStage(_, stage), "done":
                load.started(attempt, stage, 1.0)
                load.stepped(attempt, 1, 1, 2.0)
                passed_on: Message = load.computed(attempt, 0.1)
                if attempt in self.given_back and not load.active[attempt].cancelled:  # done before it was parked
                    self.given_back.remove(attempt)
                    self.told_to_stop.discard(attempt)
            case RunStage(), "cancelled" if attempt in self.told_to_stop:
                passed_on = load.stopped(attempt)
            case RunStage(), _:
                passed_on = load.stage_failed(attempt, "ValueError: no", invalid_request=True)
            case LoadInputs(), "done":
                passed_on = load.loaded(attempt, NOW)
            case StoreOutputs(), "done":
                passed_on = load.stored(attempt, stored(self.number()))
            case SaveArtifact(), "done":
                passed_on = load.saved(attempt, ARTIFACT)
            case _:
                passed_on = load.transfer_failed(attempt, "no")
        self.running[attempt] = passed_on

    @invariant()
    def credits_are_kept(self) -> None:
        load = self.load
        assert len(load.active) <= load.slots
        assert load.issued - load.taken == load.slots - len(load.active)
        assert load.taken == len(self.taken)

    @invariant()
    def every_attempt_assigned_is_with_somebody(self) -> None:
        assert set(self.running) == set(self.load.active)

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


def test_an_instance_that_has_to_end_returns_attempts_that_would_not_finish_in_time() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 4)
    slow, quick, new, queued = (Attempt(f"r/{k}", 1) for k in range(4))
    for attempt in (slow, quick, new, queued):
        load.push(push(attempt), NOW)
        load.loaded(attempt, NOW)
    for attempt, steps in ((slow, 60), (quick, 4)):
        load.started(attempt, Stage.DENOISER, 100.0)
        assert load.stepped(attempt, 2, steps, 102.0) == StageProgress(attempt, 2, steps)
    load.started(new, Stage.DENOISER, 102.0)
    assert [load.active[attempt].left_s() for attempt in (slow, quick, new, queued)] == [58.0, 2.0, 0.0, math.inf]
    assert load.return_to_head(10.0) == (CancelAttempt(slow), CancelAttempt(queued))
    assert load.end(load.stopped(slow)) == (StageReturned(slow, 5),)
    load.computed(quick, 2.0)
    assert load.return_to_head(None) == (CancelAttempt(new),), "what is computed is stored yet"
    with pytest.raises(AttemptRefusedError):
        load.push(push(slow), NOW)


def test_a_denoise_is_parked_once_its_checkpoint_is_stored_and_its_result_counts_if_it_ends_before() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 6)
    saved, unsaved, done, queued, unwanted, absent = (Attempt(f"r/{k}", 1) for k in range(6))
    for attempt in (saved, unsaved, done, queued, unwanted):
        load.push(push(attempt), NOW)
        load.loaded(attempt, NOW)
        if attempt is not queued:
            load.started(attempt, Stage.DENOISER, 100.0)
    assert load.park(queued) == (CancelAttempt(queued),), "it has nothing to lose"
    assert load.end(load.stopped(queued))[-1] == StageReturned(queued, 7)
    for attempt in (saved, unsaved, done, unwanted):
        assert load.park(attempt) == ()
        assert not load.active[attempt].cancelled
    assert load.checkpoint_ended(unsaved, stored=False) == ()
    assert load.checkpoint_ended(unsaved, stored=True) == (), "it goes on, also when a later one is stored"
    for attempt in (saved, done, unwanted):
        if attempt is unwanted:
            load.cancel(attempt)
            assert load.checkpoint_ended(attempt, stored=True) == ()
            assert load.end(load.computed(attempt, 1.0))[-1] == StageCancelled(attempt, 8)
        else:
            assert load.checkpoint_ended(attempt, stored=True) == (CancelAttempt(attempt),)
    assert load.computed(done, 1.0) == StoreOutputs(done, load.active[done].deadline)
    load.interrupted(saved, Snapshot(3, {}, StreamEvent()))
    assert load.end(load.handed_over(saved))[-1] == StageReturned(saved, 9)
    load.park(absent)
    with pytest.raises(AttemptRefusedError):
        load.push(push(absent), NOW)


def test_only_uploads_that_are_elsewhere_are_fetched_and_once_each() -> None:
    upload = Upload(f"{'0' * 64}.png", 1)
    message = msgspec.structs.replace(assign(W), inputs={"image": Images((upload, upload)), "prompt": "x"})
    here, elsewhere = (AttemptTracker("x-0", "encoder", 1, fetches_uploads=remote) for remote in (False, True))
    assert here.assign(message, NOW) == (RunStage(W, Stage.ENCODER),)
    assert elsewhere.assign(message, NOW) == (FetchUploads(W, (upload,), NOW + LEFT_S),)
    assert elsewhere.loaded(W, NOW) == RunStage(W, Stage.ENCODER)
    plain = AttemptTracker("x-0", "encoder", 1, fetches_uploads=True)
    assert plain.assign(assign(W), NOW) == (RunStage(W, Stage.ENCODER),)
    gone = AttemptTracker("x-0", "encoder", 1, fetches_uploads=True)
    gone.assign(message, NOW)
    failed = gone.transfer_failed(W, "gone", retryable=False, invalid_request=True)
    assert failed == StageFailed(W, Stage.ENCODER, "gone", False, 0, True)


@pytest.mark.parametrize("phase", list(Phase))
def test_cancel_ends_in_stage_cancelled_in_any_phase(phase: Phase) -> None:
    encodes = phase in (Phase.STORING, Phase.FETCHING)
    load = AttemptTracker("x-0", "encoder" if encodes else "decoder", 1, fetches_uploads=phase is Phase.FETCHING)
    if phase is Phase.FETCHING:
        image = Images((Upload(f"{'0' * 64}.png", 1),))
        (fetch,) = load.assign(msgspec.structs.replace(assign(W), inputs={"image": image}), NOW)
        assert isinstance(fetch, FetchUploads)
    elif phase is Phase.STORING:
        load.assign(assign(W), NOW)
        load.computed(W, 0.1)
    else:
        load.push(push(W), NOW)
    if phase in (Phase.RUNNING, Phase.SAVING):
        load.loaded(W, NOW)
    if phase is Phase.SAVING:
        load.computed(W, 0.1)
    assert load.active[W].phase is phase
    load.cancel(W)
    passed_on = {
        Phase.LOADING: lambda: load.loaded(W, NOW),
        Phase.FETCHING: lambda: load.loaded(W, NOW),
        Phase.RUNNING: lambda: load.computed(W, 0.1),
        Phase.STORING: lambda: load.stored(W, stored(1)),
        Phase.SAVING: lambda: load.saved(W, ARTIFACT),
    }[phase]()
    assert load.end(passed_on)[-1] == StageCancelled(W, 2)


def test_a_stage_that_starts_says_how_long_it_had_its_inputs_and_waited() -> None:
    load = AttemptTracker("denoiser-0", "denoiser", 2)
    load.push(push(W), NOW)
    load.loaded(W, NOW + 1.0)
    assert load.started(W, Stage.DENOISER, NOW + 3.0) == StageStarted(W, Stage.DENOISER, 2.0)
    assert load.begun() == (StageStarted(W, Stage.DENOISER, 2.0),)
    whole = AttemptTracker("monolithic-0", "monolithic", 1)
    whole.assign(assign(W), NOW)
    waited = [whole.started(W, stage, NOW + 5.0).waited_s for stage in (Stage.ENCODER, Stage.DENOISER)]
    assert waited == [5.0, 0.0], "only its first stage waited"
