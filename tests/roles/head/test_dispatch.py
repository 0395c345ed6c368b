from hypothesis import given
from hypothesis import strategies as st

from triptych.roles.head.dispatch import POLICIES, Candidate, least_loaded, max_free_slots, round_robin

candidates = st.lists(
    st.builds(
        Candidate,
        name=st.text("abcdef", min_size=1, max_size=3),
        credits=st.integers(1, 4),
        slots=st.integers(1, 4),
        load=st.integers(0, 4),
        last_served=st.integers(0, 9),
    ),
    min_size=1,
    max_size=6,
)


def at(name: str, *, free: int = 1, slots: int = 2, load: int = 0, last: int = 0) -> Candidate:
    return Candidate(name, free, slots, load, last)


def test_round_robin_gives_turns() -> None:
    assert round_robin([at("a", last=3), at("b", last=1), at("c", last=2)]).name == "b"


def test_max_free_slots_takes_the_most_credits_then_turns() -> None:
    assert max_free_slots([at("a", free=1), at("b", free=3, last=9), at("c", free=3, last=2)]).name == "c"


def test_least_loaded_counts_shares_not_units() -> None:
    assert least_loaded([at("a", slots=2, load=1), at("b", slots=8, load=2)]).name == "b"


@given(candidates)
def test_every_policy_chooses_one_of_the_candidates_whatever_their_order(choices: list[Candidate]) -> None:
    for policy in POLICIES.values():
        assert policy(choices) in choices
        if len({(c.name, c.last_served) for c in choices}) == len(choices):
            assert policy(choices) == policy(choices[::-1])
