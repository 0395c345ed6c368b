from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from triptych.actors.supervision import RestartPolicy, Strategy, decide_restart
from triptych.actors.supervision._restart import (
    FIRST_BACKOFF_S,
    FIRST_DELAY_S,
    LAST_BACKOFF_S,
    LAST_DELAY_S,
    ChildExit,
    ChildSpec,
    ExitKind,
    RestartDecision,
    Retire,
    Start,
    Stop,
    SupervisorSpec,
    Wait,
)
from triptych.backoff import backoff_s

NAMES = ("pool", "encoder-0", "denoiser-0", "denoiser-1", "decoder-0", "head", "api")
ALL = frozenset(NAMES)

strategies = st.sampled_from(Strategy)
names = st.sampled_from(NAMES)
jitters = st.floats(0, 1, exclude_max=True)
unasked = st.sampled_from([ExitKind.CLEAN, ExitKind.CRASH])
restarts = st.lists(st.sampled_from(RestartPolicy), min_size=len(NAMES), max_size=len(NAMES))
alive_sets = st.sets(names).map(frozenset)


def spec(
    strategy: Strategy = Strategy.ONE_FOR_ONE, kinds: list[RestartPolicy] | None = None, **options: float
) -> SupervisorSpec:
    kinds = kinds or [RestartPolicy.PERMANENT] * len(NAMES)
    children = tuple(ChildSpec(name, kind) for name, kind in zip(NAMES, kinds, strict=True))
    return SupervisorSpec(children, strategy, **options)  # type: ignore[arg-type]


def exit_of(name: str, kind: ExitKind = ExitKind.CRASH, at: float = 100.0) -> ChildExit:
    return ChildExit(name, kind, at, "killed by SIGKILL")


def started(decision: RestartDecision) -> list[str]:
    return [action.name for action in decision.actions if isinstance(action, Start)]


def stopped(decision: RestartDecision) -> list[str]:
    return [action.name for action in decision.actions if isinstance(action, Stop)]


@given(names, jitters, alive_sets)
def test_one_for_one_touches_nobody_else(name: str, jitter: float, alive: frozenset[str]) -> None:
    decision = decide_restart(spec(), (), exit_of(name), alive=alive, jitter=jitter)
    assert decision.actions == (Start(name),)


@given(names, jitters)
def test_one_for_all_stops_everybody_in_reverse_and_starts_them_in_order(name: str, jitter: float) -> None:
    decision = decide_restart(spec(Strategy.ONE_FOR_ALL), (), exit_of(name), alive=ALL, jitter=jitter)
    assert stopped(decision) == [other for other in reversed(NAMES) if other != name]
    assert started(decision) == list(NAMES)


@given(names, jitters)
def test_rest_for_one_takes_those_that_were_started_later(name: str, jitter: float) -> None:
    decision = decide_restart(spec(Strategy.REST_FOR_ONE), (), exit_of(name), alive=ALL, jitter=jitter)
    rest = NAMES[NAMES.index(name) :]
    assert stopped(decision) == list(reversed(rest[1:]))
    assert started(decision) == list(rest)


@given(strategies, names, unasked, jitters, alive_sets, restarts)
def test_stops_come_before_the_wait_and_the_wait_before_starts(
    strategy: Strategy, name: str, kind: ExitKind, jitter: float, alive: frozenset[str], kinds: list[RestartPolicy]
) -> None:
    decision = decide_restart(spec(strategy, kinds), (99.0, 99.5), exit_of(name, kind), alive=alive, jitter=jitter)
    ranks = {Stop: 0, Retire: 1, Wait: 2, Start: 3}
    order = [ranks[type(action)] for action in decision.actions]
    assert order == sorted(order)


@given(strategies, names, jitters, alive_sets)
def test_a_sibling_that_was_left_for_good_is_neither_stopped_nor_started(
    strategy: Strategy, name: str, jitter: float, alive: frozenset[str]
) -> None:
    decision = decide_restart(spec(strategy), (), exit_of(name), alive=alive, jitter=jitter)
    assert {*started(decision), *stopped(decision)} <= alive | {name}


@given(strategies, names, jitters)
def test_a_temporary_sibling_is_stopped_with_the_group_and_not_started_again(
    strategy: Strategy, name: str, jitter: float
) -> None:
    kinds = [RestartPolicy.PERMANENT if other == name else RestartPolicy.TEMPORARY for other in NAMES]
    decision = decide_restart(spec(strategy, kinds), (), exit_of(name), alive=ALL, jitter=jitter)
    assert started(decision) == [name]
    left = [action.name for action in decision.actions if isinstance(action, Retire)]
    assert sorted(left) == sorted(stopped(decision))


@given(strategies, names, st.lists(st.floats(0, 100), max_size=8), alive_sets)
def test_a_start_failure_is_never_retried_and_touches_nobody(
    strategy: Strategy, name: str, history: list[float], alive: frozenset[str]
) -> None:
    decision = decide_restart(
        spec(strategy), tuple(sorted(history)), exit_of(name, ExitKind.START_FAILURE), alive=alive
    )
    assert decision.actions == (Retire(name, "failed", "killed by SIGKILL"),)


@given(strategies, names, st.lists(st.floats(70.5, 99.5), max_size=12), st.integers(0, 10_000), jitters)
def test_a_delayed_start_is_waited_for_without_end_alone_and_without_counting(
    strategy: Strategy, name: str, recent: list[float], delays: int, jitter: float
) -> None:
    history = tuple(sorted(recent))
    ended = exit_of(name, ExitKind.START_DELAYED)
    decision = decide_restart(spec(strategy), history, ended, alive=ALL, jitter=jitter, delays=delays)
    wait, start = decision.actions
    assert isinstance(wait, Wait)
    assert FIRST_DELAY_S / 2 < wait.seconds <= LAST_DELAY_S
    assert (start, decision.history) == (Start(name), history)


@given(strategies, names, unasked, st.sampled_from(RestartPolicy))
def test_the_kind_of_restart_decides_who_comes_back(
    strategy: Strategy, name: str, kind: ExitKind, restart: RestartPolicy
) -> None:
    decision = decide_restart(spec(strategy, [restart] * len(NAMES)), (), exit_of(name, kind), alive=ALL)
    wanted = restart is RestartPolicy.PERMANENT or (restart is RestartPolicy.TRANSIENT and kind is ExitKind.CRASH)
    if wanted:
        assert name in started(decision)
    else:
        assert decision.actions == (Retire(name, "stopped", "killed by SIGKILL"),)


@given(strategies, names, st.integers(0, 6), st.lists(st.floats(70.5, 99.5), max_size=12))
def test_more_restarts_than_the_intensity_allows_give_up_that_child(
    strategy: Strategy, name: str, intensity: int, recent: list[float]
) -> None:
    decision = decide_restart(
        spec(strategy, intensity=intensity, period_s=30.0), tuple(sorted(recent)), exit_of(name), alive=ALL
    )
    gave_up = [action for action in decision.actions if isinstance(action, Retire) and action.state == "gave_up"]
    assert bool(gave_up) == (len(recent) >= intensity)
    if gave_up:
        assert decision.actions == (gave_up[0],)
        assert gave_up[0].name == name
        assert "killed by SIGKILL" in gave_up[0].reason


@given(names, st.lists(st.floats(0, 70), max_size=20))
def test_restarts_before_the_period_count_no_more(name: str, old: list[float]) -> None:
    decision = decide_restart(spec(intensity=1, period_s=30.0), tuple(sorted(old)), exit_of(name))
    assert decision.actions == (Start(name),)
    assert decision.history == (100.0,)


@given(names, st.integers(0, 30), jitters)
def test_the_first_restart_is_immediate_and_the_others_wait(name: str, count: int, jitter: float) -> None:
    history = tuple(99 + n / 100 for n in range(count))
    decision = decide_restart(spec(intensity=100), history, exit_of(name), jitter=jitter)
    waits = [action.seconds for action in decision.actions if isinstance(action, Wait)]
    wait = backoff_s(count - 1, first_s=FIRST_BACKOFF_S, longest_s=LAST_BACKOFF_S, jitter=jitter)
    assert waits == ([wait] if count else [])


@given(names, st.integers(1, 8), st.lists(st.floats(0.001, 3), min_size=1, max_size=40))
def test_a_child_that_keeps_crashing_is_given_up_after_exactly_its_intensity(
    name: str, intensity: int, gaps: list[float]
) -> None:
    rules = spec(intensity=intensity, period_s=1000.0)
    history: tuple[float, ...] = ()
    now, count = 0.0, 0
    for gap in gaps:
        now += gap
        decision = decide_restart(rules, history, exit_of(name, at=now))
        history = decision.history
        if any(isinstance(action, Retire) for action in decision.actions):
            break
        count += 1
    assert count == min(intensity, len(gaps))
