"""The head's decisions, by example."""

from __future__ import annotations

import pytest

from tests.roles.books import KINDS, a_slot, after, failed, finished, hello, ledger, request, staged
from triptych.engines.panels import Panel
from triptych.engines.parameters import Signature
from triptych.roles.effects import Assign, Cancel, Release, Settle
from triptych.roles.fleet import Fleet
from triptych.roles.ledger import MAX_STALLS, Ledger
from triptych.roles.messages.stages import InstanceHello, StageReturned, TransferFailed, TransferStaged
from triptych.roles.messages.work import Work
from triptych.roles.request import State, Unit
from triptych.roles.staging import AHEAD


@pytest.fixture
def books() -> Ledger:
    books = ledger()
    for kind in KINDS:
        books.hello(hello(f"{kind}-0", slots=2), 0.0)
    return books


def to_denoiser(books: Ledger, id_: str = "r") -> Unit:
    books.accept(request(id_), 0.0)
    after(books)
    unit = books.units[f"{id_}/0"]
    assert books.started(unit.work, "encoder-0", Panel.ENCODER, 1.0)
    assert books.staged(staged(unit.work, "encoder", 1), 2.0)
    after(books)
    assert books.started(unit.work, "denoiser-0", Panel.DENOISER, 3.0)
    return unit


def test_a_picture_goes_through_three_panels(books: Ledger) -> None:
    unit = to_denoiser(books)
    assert books.staged(staged(unit.work, "denoiser", 2), 4.0)
    effects = after(books)
    assert Release((a_slot(1).lease,)) in effects, "the encoder's slot is kept until the denoiser is done with it"
    assert Assign("decoder-0", "r/0") in effects
    assert books.finished(finished(unit.work), 5.0)
    effects = after(books)
    assert Release((a_slot(2).lease,)) in effects
    assert Settle("r") in effects
    view = books.requests["r"].view()
    assert view.state == "DONE"
    assert [m.state for m in view.units[0].history][-1] == "DONE"
    assert view.units[0].instances == {"encoder": "encoder-0", "denoiser": "denoiser-0", "decoder": "decoder-0"}
    assert books.tally.average_latency_s == 5.0


def test_nothing_is_sent_without_a_credit() -> None:
    books = ledger()
    books.hello(hello("encoder-0", slots=1), 0.0)
    books.accept(request("a"), 0.0)
    books.accept(request("b"), 0.0)
    assert after(books) == [Assign("encoder-0", "a/0")]
    assert after(books) == []
    work = books.units["a/0"].work
    books.staged(TransferStaged(work, "encoder-0", Panel.ENCODER, a_slot(1), 0.1, issued=2), 1.0)
    assert after(books) == [Assign("encoder-0", "b/0")]


def test_a_death_reruns_only_the_lost_stage_from_its_upstream_lease(books: Ledger) -> None:
    unit = to_denoiser(books)
    books.hello(hello("denoiser-1"), 3.0)
    first = unit.work
    books.instance_down("denoiser-0", "its process ended", 4.0)
    effects = after(books)
    assert Assign("denoiser-1", "r/0") in effects
    assert not [e for e in effects if isinstance(e, Release)]
    assert unit.state is State.DENOISING_WAITING
    assert unit.work == Work("r/0", first.attempt + 1)
    assert not books.staged(staged(first, "denoiser", 9), 5.0), "the old attempt no longer counts"
    assert after(books) == [Release((a_slot(9).lease,))]


def test_a_lost_pool_sends_waiting_work_back_to_the_start(books: Ledger) -> None:
    unit = to_denoiser(books)
    books.pool_down("pool", 2, 4.0)
    assert unit.state is State.DENOISING_RUNNING, "it may have loaded its tensors already"
    books.instance_down("denoiser-0", "its process ended", 5.0)
    assert unit.state is State.ENCODER_WAITING
    assert unit.failures == 1


def test_a_unit_that_kills_twice_fails_and_others_go_on(books: Ledger) -> None:
    unit = to_denoiser(books)
    books.instance_down("denoiser-0", "its process ended", 4.0)
    books.hello(hello("denoiser-0", generation=2, slots=2), 5.0)
    after(books)
    books.started(unit.work, "denoiser-0", Panel.DENOISER, 5.5)
    books.instance_down("denoiser-0", "its process ended", 6.0)
    assert unit.state is State.FAILED
    assert len(unit.causes) == 2
    assert unit.instance == ""
    assert Settle("r") in after(books)


def lose_denoiser(books: Ledger, unit: Unit, generation: int, now: float) -> None:
    """Its connection is lost while it computes the unit; the next incarnation has the unit again."""
    assert books.connection_lost("denoiser-0", generation, now)
    books.hello(hello("denoiser-0", generation=generation + 1, slots=2), now)
    after(books, now)
    if not unit.terminal:
        assert books.started(unit.work, "denoiser-0", Panel.DENOISER, now)


def test_an_orderly_end_is_not_the_works_fault_however_often(books: Ledger) -> None:
    unit = to_denoiser(books)
    for generation in range(1, 6):
        books.fleet.leave("denoiser-0", generation - 1)
        assert not books.fleet.instances["denoiser-0"].draining, "an earlier incarnation said so"
        books.fleet.leave("denoiser-0", generation)
        assert not books.fleet.candidates(Panel.DENOISER)
        if generation % 2:
            assert books.returned(StageReturned(unit.work, "denoiser-0", 3), 4.0)
            assert not unit.instance
        lose_denoiser(books, unit, generation, 5.0)
    assert unit.state is State.DENOISING_RUNNING
    assert (unit.deaths, unit.failures, unit.stalls) == (0, 0, 0)
    assert "asked to end" in unit.causes[0]


def test_an_instance_that_was_silent_before_its_end_was_stopped_and_not_brought_down_by_its_work(books: Ledger) -> None:
    unit = to_denoiser(books)
    for generation in (1, 2):
        assert books.listen(0.6 * books.heartbeat_timeout_s, 4.0) == []
        for name in ("encoder-0", "decoder-0"):
            assert books.fleet.heard(name, 1)
        lose_denoiser(books, unit, generation, 5.0)
    assert (unit.deaths, unit.failures, unit.stalls) == (0, 0, 2)
    for generation in (3, 4):
        books.listen(0.4 * books.heartbeat_timeout_s, 6.0)
        for name in ("encoder-0", "decoder-0"):
            assert books.fleet.heard(name, 1)
        lose_denoiser(books, unit, generation, 7.0)
    assert unit.state is State.FAILED, "it was heard, and then its process ended: twice"
    assert unit.causes[-1] == "denoiser-0: its process ended"


def test_silence_fences_and_costs_no_attempt_but_does_not_go_on_for_ever(books: Ledger) -> None:
    unit = to_denoiser(books)
    for generation in range(1, MAX_STALLS + 1):
        assert not unit.terminal
        assert not books.fleet.heard("denoiser-0", generation + 1)
        assert "denoiser-0" in books.listen(books.heartbeat_timeout_s + 1, 4.0)
        assert books.fleet.fenced("denoiser-0", generation)
        books.hello(hello("denoiser-0", generation=generation + 1, slots=2), 5.0)
        after(books)
        books.started(unit.work, "denoiser-0", Panel.DENOISER, 5.0)
    assert unit.state is State.FAILED
    assert (unit.deaths, unit.failures) == (0, 0)
    assert "fell silent" in unit.history[-1].reason


def test_attempts_are_bounded_and_every_cause_is_kept(books: Ledger) -> None:
    unit = to_denoiser(books)
    for k in range(3):
        assert not unit.terminal
        assert books.stage_failed(failed(unit.work, f"boom {k}", retryable=True), 4.0)
        after(books)
    assert unit.state is State.FAILED
    assert unit.causes == ["denoiser-0: boom 0", "denoiser-0: boom 1", "denoiser-0: boom 2"]


def test_damaged_transfers_cost_no_attempt_but_do_not_go_on_for_ever(books: Ledger) -> None:
    unit = to_denoiser(books)
    for k in range(11):
        assert unit.state is State.DENOISING_WAITING or k == 0
        assert books.transfer_failed(TransferFailed(unit.work, "denoiser-0", "damaged", False, 99), 4.0)
        after(books)
    assert unit.state is State.FAILED
    assert unit.failures == 0


def test_a_request_at_fault_fails_at_once_with_its_cause(books: Ledger) -> None:
    unit = to_denoiser(books)
    books.stage_failed(failed(unit.work, "ValueError: bad size", retryable=False), 4.0)
    assert unit.view().at_fault
    assert unit.state is State.FAILED
    assert unit.history[-1].reason == "ValueError: bad size"


def test_an_instance_that_drains_gets_nothing_more_and_the_refusal_costs_no_attempt(books: Ledger) -> None:
    books.hello(hello("encoder-1"), 0.0)
    books.accept(request(), 0.0)
    (assigned,) = after(books)
    assert isinstance(assigned, Assign)
    unit = books.units["r/0"]
    books.not_taken(assigned.instance, unit.work, "draining", "it ends", 1.0)
    (again,) = after(books)
    assert isinstance(again, Assign)
    assert again.instance != assigned.instance
    assert (unit.failures, unit.attempt) == (0, 2)
    books.not_taken(again.instance, unit.work, "draining", "it ends", 1.0)
    assert after(books) == []
    books.hello(hello(assigned.instance, generation=2), 2.0)
    assert after(books) == [Assign(assigned.instance, "r/0")]


@pytest.mark.parametrize("code", ["mailbox_full", "deadline_exceeded", "draining", "stopping", "no_credit"])
def test_a_refusal_before_anything_was_done_costs_no_attempt(books: Ledger, code: str) -> None:
    books.accept(request(), 0.0)
    after(books)
    unit = books.units["r/0"]
    books.not_taken("encoder-0", unit.work, code, "not now", 1.0)
    assert (unit.state, unit.failures) == (State.ENCODER_WAITING, 0)


def test_cancel_stops_the_work_and_returns_the_leases(books: Ledger) -> None:
    unit = to_denoiser(books)
    work = unit.work
    books.cancel("r", "enough", 4.0)
    effects = after(books)
    assert Cancel("denoiser-0", work, "enough") in effects
    assert Release((a_slot(1).lease,)) in effects
    assert Settle("r") in effects
    assert not books.staged(staged(work, "denoiser", 2), 5.0)
    assert after(books) == [Release((a_slot(2).lease,))]
    assert books.requests["r"].state is State.CANCELLED


def test_a_request_times_out_by_elapsed_time_and_by_no_clock(books: Ledger) -> None:
    unit = to_denoiser(books)
    books.requests["r"].deadline = unit.left_s = 10.0
    books.elapse(9.9, now=1e12)
    assert not unit.terminal
    books.elapse(0.1, now=-1e12)
    assert unit.state is State.TIMED_OUT
    assert unit.history[-1].reason == "still DENOISING_RUNNING after 10 s ([head] request_timeout_s = 10)"


def test_a_stage_times_out_by_itself_where_it_has_a_bound() -> None:
    books = ledger(waiting_timeout_s=5, running_timeout_s=50)
    books.accept(request("waits"), 0.0)
    books.accept(request("runs"), 0.0)
    runs = books.units["runs/0"]
    runs.instance = "encoder-0"
    assert books.started(runs.work, "encoder-0", Panel.ENCODER, 1.0)
    books.elapse(4.0, 5.0)
    assert runs.stage_s == 4.0
    books.elapse(1.0, 5.0)
    assert books.requests["waits"].state is State.TIMED_OUT
    assert not runs.terminal
    books.elapse(45.0, 51.0)
    assert runs.state is State.TIMED_OUT
    assert runs.history[-1].reason == "ENCODER_RUNNING for 50 s ([head] running_timeout_s = 50)"
    assert Cancel("encoder-0", runs.work, runs.history[-1].reason) in after(books)


def test_a_forgotten_request_frees_its_key(books: Ledger) -> None:
    kept = request("r")
    kept.idempotency_key = "k"
    books.accept(kept, 0.0)
    books.forget(["r"])
    assert books.by_key == {"k": kept}
    books.cancel("r", "enough", 1.0)
    books.forget(["r"])
    assert books.by_key == {}
    assert books.requests == {}


def test_a_restarted_head_keeps_what_an_instance_still_has_in_hand(books: Ledger) -> None:
    unit = to_denoiser(books)
    restarted = ledger()
    restarted.accept(books.requests["r"], 4.5)
    assert restarted.hello(hello("denoiser-0", slots=2, running=(unit.work, Work("gone/0", 1))), 5.0) == (
        Work("gone/0", 1),
    )
    restarted.orphans(9.0)
    assert unit.state is State.DENOISING_RUNNING
    assert restarted.staged(staged(unit.work, "denoiser", 2), 10.0)


def test_a_restarted_head_reruns_what_nobody_claims(books: Ledger) -> None:
    unit = to_denoiser(books)
    restarted = ledger()
    restarted.accept(books.requests["r"], 4.5)
    restarted.orphans(9.0)
    assert unit.state is State.DENOISING_WAITING
    assert unit.failures == 0


def test_what_was_accepted_just_before_the_head_died_starts_with_the_next_one() -> None:
    """The journal has it as PENDING: it was written, and nothing else had been done."""
    restarted = ledger()
    restarted.accept(request(), 1.0)
    restarted.hello(hello("encoder-0"), 2.0)
    assert after(restarted) == [Assign("encoder-0", "r/0")]
    assert restarted.units["r/0"].work == Work("r/0", 1)


def test_a_report_said_twice_does_not_release_what_is_in_use(books: Ledger) -> None:
    unit = to_denoiser(books)
    assert not books.staged(staged(unit.work, "encoder", 1), 5.0)
    assert [e for e in after(books) if isinstance(e, Release)] == []
    assert unit.state is State.DENOISING_RUNNING


def test_encoders_wait_when_enough_is_staged_for_the_denoisers() -> None:
    books = ledger()
    books.hello(hello("encoder-0", slots=50), 0.0)
    books.hello(hello("denoiser-0", slots=1), 0.0)
    for k in range(20):
        books.accept(request(f"r{k}"), 0.0)
    assert len(after(books)) == 3


def test_a_monolithic_instance_passes_through_every_state() -> None:
    books = ledger()
    books.hello(InstanceHello("mono-0", "monolithic", 1, 1, 1, 1, 0, pool="", signature=Signature(), running=()), 0.0)
    books.accept(request(), 0.0)
    assert after(books) == [Assign("mono-0", "r/0")]
    unit = books.units["r/0"]
    for panel in Panel:
        assert books.started(unit.work, "mono-0", panel, 1.0)
    assert books.finished(finished(unit.work, "mono-0"), 2.0)
    assert [m.state for m in unit.history] == [s.value for s in State][1:10]


def test_while_no_denoiser_is_there_no_more_is_encoded_than_for_those_of_the_topology() -> None:
    books = ledger()
    books.fleet = Fleet({Panel.DENOISER: 2})
    books.hello(hello("encoder-0", slots=20), 0.0)
    books.accept(request(n=20), 0.0)
    assert len(after(books)) == 2 * (AHEAD + 1)


def test_what_runs_out_of_time_says_what_its_instance_waited_for() -> None:
    books = ledger()
    books.hello(hello("encoder-0"), 0.0)
    books.accept(request(), 0.0)
    after(books)
    books.started(books.units["r/0"].work, "encoder-0", Panel.ENCODER, 1.0)
    assert books.fleet.heard("encoder-0", 1, "the disk is full")
    assert books.fleet.instances["encoder-0"].view().trouble == "the disk is full"
    books.elapse(1e10, 2.0)
    last = books.requests["r"].units[0].history[-1]
    assert last.state == "TIMED_OUT"
    assert last.reason.endswith(": the disk is full")
