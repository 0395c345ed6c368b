from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triptych.engines.panels import Panel
from triptych.roles.messages.work import LeaseRef, Staged
from triptych.roles.request import JOURNEY, LEGAL, TERMINAL, IllegalTransitionError, State, Unit

ALL_MOVES = [(origin, target) for origin in State for target in State]


def unit_in(state: State) -> Unit:
    return Unit("r/0", "r", 0, 7, left_s=100.0, state=state)


def staged(n: int = 0) -> Staged:
    return Staged(LeaseRef("pool", 1, n, 0, 64), b"", 0, 64)


@pytest.mark.parametrize(("origin", "target"), [m for m in ALL_MOVES if m[1] in LEGAL[m[0]]])
def test_each_legal_move_is_made_and_kept_with_its_time(origin: State, target: State) -> None:
    unit = unit_in(origin)
    unit.move(target, 5.0, "why")
    assert unit.state is target
    assert [(m.state, m.at, m.reason) for m in unit.history] == [(target.value, 5.0, "why")]


@pytest.mark.parametrize(("origin", "target"), [m for m in ALL_MOVES if m[1] not in LEGAL[m[0]]])
def test_each_illegal_move_raises_and_changes_nothing(origin: State, target: State) -> None:
    unit = unit_in(origin)
    with pytest.raises(IllegalTransitionError, match=f"from {origin} to {target}"):
        unit.move(target, 5.0)
    assert unit.state is origin
    assert unit.history == []


def test_the_table_says_what_the_design_says() -> None:
    for origin, target in pairwise(JOURNEY):
        assert target in LEGAL[origin]
    for state in State:
        if state in TERMINAL:
            assert not LEGAL[state]
        else:
            assert {State.FAILED, State.TIMED_OUT, State.CANCELLED} <= LEGAL[state]
    for running, waiting in (
        (State.ENCODER_RUNNING, State.ENCODER_WAITING),
        (State.DENOISING_RUNNING, State.DENOISING_WAITING),
        (State.DECODER_RUNNING, State.DECODER_WAITING),
    ):
        assert waiting in LEGAL[running]
        assert running not in LEGAL[running]
    assert State.DECODER_WAITING not in LEGAL[State.ENCODER_RUNNING]


def test_advance_walks_every_state_between() -> None:
    unit = unit_in(State.ENCODER_RUNNING)
    unit.advance(State.DENOISING_RUNNING, 1.0)
    assert [m.state for m in unit.history] == ["ENCODER_DONE", "DENOISING_WAITING", "DENOISING_RUNNING"]


def test_advance_does_not_go_back() -> None:
    with pytest.raises(IllegalTransitionError):
        unit_in(State.DECODER_WAITING).advance(State.ENCODER_WAITING, 1.0)


@given(st.lists(st.sampled_from(State), max_size=30))
def test_whatever_is_tried_only_legal_histories_come_about(targets: list[State]) -> None:
    unit = unit_in(State.PENDING)
    for target in targets:
        try:
            unit.move(target, 0.0)
        except IllegalTransitionError:
            continue
    states = [State.PENDING, *(State(m.state) for m in unit.history)]
    assert all(b in LEGAL[a] for a, b in pairwise(states))


@pytest.mark.parametrize(
    ("at_rest", "lost", "resumed"),
    [
        ((), Panel.ENCODER, Panel.ENCODER),
        ((), Panel.DENOISER, Panel.ENCODER),
        ((Panel.ENCODER,), Panel.DENOISER, Panel.DENOISER),
        ((Panel.DENOISER,), Panel.DECODER, Panel.DECODER),
        ((Panel.ENCODER,), Panel.DECODER, Panel.DENOISER),
        ((), Panel.DECODER, Panel.ENCODER),
    ],
)
def test_a_lost_panel_resumes_from_what_is_at_rest(at_rest: tuple[Panel, ...], lost: Panel, resumed: Panel) -> None:
    unit = unit_in(State.PENDING)
    unit.staged = {panel: staged() for panel in at_rest}
    assert unit.resume_panel(lost) is resumed
