from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.engines.stages import Stage
from triptych.roles.head.job import (
    HAPPY_PATH,
    LEGAL_TRANSITIONS,
    MAX_CAUSES,
    MAX_MOVES,
    TERMINAL_STATES,
    IllegalTransitionError,
    Job,
    Request,
    State,
    StoredOutput,
)
from triptych.roles.messages.common import LeaseRef, Output, StoredPayload


def job_in(state: State) -> Job:
    return Job("r/0", "r", 0, 7, expires_at=100.0, state=state)


def stored(n: int = 0) -> StoredPayload:
    return StoredPayload(LeaseRef("pool", 1, n, 0, 64), b"", 0, 64)


def test_the_table_says_what_the_design_says() -> None:
    for origin, target in pairwise(HAPPY_PATH):
        assert target in LEGAL_TRANSITIONS[origin]
    for state in State:
        if state in TERMINAL_STATES:
            assert not LEGAL_TRANSITIONS[state]
        else:
            assert {State.FAILED, State.TIMED_OUT, State.CANCELLED} <= LEGAL_TRANSITIONS[state]
    for running, waiting in (
        (State.ENCODER_RUNNING, State.ENCODER_WAITING),
        (State.DENOISING_RUNNING, State.DENOISING_WAITING),
        (State.DECODER_RUNNING, State.DECODER_WAITING),
    ):
        assert waiting in LEGAL_TRANSITIONS[running]
        assert running not in LEGAL_TRANSITIONS[running]
    assert State.DECODER_WAITING not in LEGAL_TRANSITIONS[State.ENCODER_RUNNING]


def test_advance_walks_every_state_between() -> None:
    job = job_in(State.ENCODER_RUNNING)
    job.advance(State.DENOISING_RUNNING, 1.0)
    assert [m.state for m in job.history] == ["ENCODER_DONE", "DENOISING_WAITING", "DENOISING_RUNNING"]


def test_advance_does_not_go_back() -> None:
    with pytest.raises(IllegalTransitionError):
        job_in(State.DECODER_WAITING).advance(State.ENCODER_WAITING, 1.0)


@given(st.lists(st.sampled_from(State), max_size=30))
def test_a_legal_move_is_kept_with_its_time_and_reason_and_an_illegal_one_changes_nothing(targets: list[State]) -> None:
    job = job_in(State.PENDING)
    expected: list[tuple[str, float, str]] = []
    for at, target in enumerate(targets):
        origin = job.state
        if target in LEGAL_TRANSITIONS[origin]:
            job.transition(target, float(at), "why")
            expected.append((target.value, float(at), "why"))
            assert job.state is target
        else:
            with pytest.raises(IllegalTransitionError, match=f"from {origin} to {target}"):
                job.transition(target, float(at))
            assert job.state is origin
        assert [(move.state, move.at, move.reason) for move in job.history] == expected


@pytest.mark.parametrize(
    ("at_rest", "lost", "resumed"),
    [
        (None, Stage.ENCODER, Stage.ENCODER),
        (None, Stage.DENOISER, Stage.ENCODER),
        (Stage.ENCODER, Stage.DENOISER, Stage.DENOISER),
        (Stage.DENOISER, Stage.DECODER, Stage.DECODER),
        (Stage.ENCODER, Stage.DECODER, Stage.DENOISER),
        (None, Stage.DECODER, Stage.ENCODER),
    ],
)
def test_a_lost_stage_resumes_from_what_is_at_rest(at_rest: Stage | None, lost: Stage, resumed: Stage) -> None:
    job = job_in(State.PENDING)
    job.stored = StoredOutput(at_rest, stored()) if at_rest else None
    assert job.resume_stage(lost) is resumed


@pytest.mark.parametrize(
    ("deadline_s", "state", "finished_at", "met"),
    [
        (2.0, State.DONE, 12.0, True),
        (2.0, State.DONE, 12.5, False),
        (2.0, State.FAILED, 11.0, False),
        (2.0, State.DENOISING_RUNNING, 0.0, None),
        (0.0, State.DONE, 12.0, None),
    ],
)
def test_a_request_says_at_its_end_whether_it_met_its_deadline(
    deadline_s: float, state: State, finished_at: float, met: bool | None
) -> None:
    ended = Request(
        "r", {}, Output("png"), 10.0, 610.0, [job_in(state)], finished_at=finished_at, deadline_s=deadline_s
    )
    assert (ended.view().deadline_s, ended.view().deadline_met) == (deadline_s or None, met)


def test_of_a_job_that_is_lost_again_and_again_the_first_and_the_last_moves_and_causes_are_kept() -> None:
    job = job_in(State.PENDING)
    job.advance(State.DECODER_WAITING, 0.0)
    revisions = set[str]()
    for k in range(1000):
        job.add_cause(f"cause {k}")
        job.transition(State.DECODER_RUNNING, float(k))
        job.transition(State.DECODER_WAITING, float(k), f"cause {k}")
        revisions.add(Request("r", {}, Output(), 0.0, 9.0, [job]).revision)
    assert (len(job.causes), job.causes[0], job.causes[-1]) == (MAX_CAUSES, "cause 0", "cause 999")
    first, *_, last = job.history
    assert (len(job.history), first.state, last.reason) == (MAX_MOVES, "ENCODER_WAITING", "cause 999")
    assert (job.moves, len(revisions)) == (2007, 1000), "who waits for a change still sees each"
