from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.roles.factories import after, make_scheduler, registration, request
from triptych.actors import TopologyError, load_topology
from triptych.actors.topology.sections import DispatchName
from triptych.roles.head.dispatch import POLICIES, Candidate, DispatchPolicy
from triptych.roles.head.effects import Assign
from triptych.roles.head.job import Job, Request

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
REQUEST = request()


def at(name: str, *, free: int = 1, slots: int = 2, load: int = 0, last: int = 0) -> Candidate:
    return Candidate(name, free, slots, load, last)


def chosen(policy: str, *choices: Candidate) -> Candidate:
    return POLICIES[policy].choose(REQUEST.jobs[0], REQUEST, choices)


def test_round_robin_gives_turns() -> None:
    assert chosen("round_robin", at("a", last=3), at("b", last=1), at("c", last=2)).name == "b"


def test_max_free_slots_takes_the_most_credits_then_turns() -> None:
    assert chosen("max_free_slots", at("a"), at("b", free=3, last=9), at("c", free=3, last=2)).name == "c"


def test_least_loaded_counts_shares_not_jobs() -> None:
    assert chosen("least_loaded", at("a", slots=2, load=1), at("b", slots=8, load=2)).name == "b"


@given(candidates)
def test_every_policy_chooses_one_of_the_candidates_whatever_their_order(choices: list[Candidate]) -> None:
    for policy in POLICIES:
        assert chosen(policy, *choices) in choices
        if len({(c.name, c.last_served) for c in choices}) == len(choices):
            assert chosen(policy, *choices) == chosen(policy, *choices[::-1])


def test_a_policy_may_go_by_the_inputs_of_a_request() -> None:
    class Affinity(DispatchPolicy):
        """Requests with an adapter first, and to the instance that is kept for it."""

        def priority(self, job: Job, request: Request) -> float:
            return 0.0 if "lora" in request.inputs else 1.0

        def choose(self, job: Job, request: Request, candidates: Sequence[Candidate]) -> Candidate:
            kept = [candidate for candidate in candidates if candidate.name == request.inputs.get("lora")]
            return (kept or candidates)[0]

    scheduler = make_scheduler()
    scheduler.policy = Affinity()
    for name in ("encoder-0", "encoder-1"):
        scheduler.register(registration(name), 0.0)
    for id_, inputs in (("plain", {}), ("late", {}), ("inked", {"lora": "encoder-1"})):
        scheduler.accept(request(id_, **inputs), 0.0)
    assert after(scheduler) == [Assign("encoder-1", "inked/0"), Assign("encoder-0", "plain/0")]


def test_the_topology_takes_the_names_of_the_policies_and_no_other(tmp_path: Path) -> None:
    assert set(POLICIES) == set(get_args(DispatchName))
    path = tmp_path / "t.toml"
    for name in POLICIES:
        path.write_text(f'[model]\npath = "m"\n[[roles]]\nkind = "monolithic"\n[head]\ndispatch = "{name}"\n')
        assert load_topology(path).head.dispatch == name
    path.write_text('[model]\npath = "m"\n[[roles]]\nkind = "monolithic"\n[head]\ndispatch = "random"\n')
    with pytest.raises(TopologyError, match="dispatch") as refused:
        load_topology(path)
    assert all(name in str(refused.value) for name in POLICIES)
