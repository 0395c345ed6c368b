"""Which waiting job goes next, and to which instance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.roles.factories import after, make_scheduler, registration, request, scheduled, stored
from triptych.actors import TopologyError, load_topology
from triptych.actors.topology.sections import DispatchName, SchedulingPolicyName
from triptych.engines.stages import Stage
from triptych.roles.head.dispatch import POLICIES, Candidate, DispatchPolicy, OrderedPolicy, pools_of
from triptych.roles.head.effects import Assign
from triptych.roles.head.free_instances import FreeInstances
from triptych.roles.head.job import Checkpoint, Job, Request, StoredOutput
from triptych.roles.messages.common import LeaseRef, StoredPayload
from triptych.roles.scheduling_policy import MAX_PASSED_OVER

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
    unique_by=lambda candidate: candidate.name,
)
ORDERED = [name for name, policy in POLICIES.items() if isinstance(policy, OrderedPolicy)]
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


@given(candidates, st.sampled_from(ORDERED))
def test_the_first_of_all_and_of_each_pool_are_as_good_as_all(choices: list[Candidate], policy: DispatchName) -> None:
    choices = [replace(each, pool=f"pool-{k % 3}") for k, each in enumerate(choices)]
    job = request().jobs[0]
    job.stored = StoredOutput(Stage.ENCODER, stored_in("pool-1"))
    job.checkpoint = Checkpoint(3, stored_in("pool-2"))
    free = FreeInstances(POLICIES[policy])
    for each in choices:
        free.file(each.name, Stage.DENOISER, each)
    contenders = free.contenders(Stage.DENOISER, "", pools_of(job))
    assert len(contenders) <= 3
    found = POLICIES[policy].choose(REQUEST.jobs[0], REQUEST, choices)
    assert POLICIES[policy].choose(REQUEST.jobs[0], REQUEST, contenders) == found
    near = POLICIES[policy].choose(job, REQUEST, choices)
    assert POLICIES[policy].choose(job, REQUEST, contenders) == near


def stored_in(pool: str) -> StoredPayload:
    return StoredPayload(LeaseRef(pool, 1, 1, 0, 64), b"", 0, 64)


@pytest.mark.parametrize("policy", ORDERED)
def test_where_loads_are_equal_the_instance_that_shares_the_pool_gets_the_job(policy: DispatchName) -> None:
    job = request().jobs[0]
    job.stored = StoredOutput(Stage.ENCODER, stored_in("pool-a"))
    far, near, busy = (
        replace(at("far", free=2), pool="pool-b"),
        replace(at("near", free=2, last=5), pool="pool-a"),
        replace(at("near", free=1, load=1, last=5), pool="pool-a"),
    )
    choose = POLICIES[policy].choose
    assert choose(job, REQUEST, [far, near]) == near
    assert choose(job, REQUEST, [far, busy]) == far, "it has more to do"
    assert choose(REQUEST.jobs[0], REQUEST, [far, near]) == far, "nothing is stored"
    job.checkpoint = Checkpoint(3, stored_in("pool-b"))
    assert choose(job, REQUEST, [near, far]) == far, "a checkpoint saves more than the transfer of the input"


@given(candidates)
def test_every_policy_chooses_one_of_the_candidates_whatever_their_order(choices: list[Candidate]) -> None:
    for policy in POLICIES:
        assert chosen(policy, *choices) in choices
        assert chosen(policy, *choices) == chosen(policy, *choices[::-1])


def test_a_policy_may_go_by_the_inputs_of_a_request() -> None:
    class Affinity(DispatchPolicy):
        """To the instance that is kept for the request's adapter."""

        def choose(self, job: Job, request: Request, candidates: Sequence[Candidate]) -> Candidate:
            kept = [candidate for candidate in candidates if candidate.name == request.inputs.get("lora")]
            return (kept or candidates)[0]

    scheduler = make_scheduler(dispatch_policy=Affinity())
    for name in ("encoder-0", "encoder-1"):
        scheduler.register(registration(name), 0.0)
    for id_, inputs in (("inked", {"lora": "encoder-1"}), ("plain", {})):
        scheduler.accept(request(id_, **inputs), 0.0)
    assert after(scheduler) == [Assign("encoder-1", "inked/0"), Assign("encoder-0", "plain/0")]


def test_the_topology_takes_the_names_of_the_policies_and_no_other(tmp_path: Path) -> None:
    assert set(POLICIES) == set(get_args(DispatchName))
    path = tmp_path / "t.toml"
    for name in POLICIES:
        path.write_text(f'[model]\npath = "m"\n[[roles]]\nkind = "monolithic"\n[head]\ndispatch = "{name}"\n')
        assert load_topology(path).head.dispatch == name
    path.write_text('[model]\npath = "m"\n[[roles]]\nkind = "monolithic"\n[head]\ndispatch = "?"\n')
    with pytest.raises(TopologyError, match="dispatch") as refused:
        load_topology(path)
    assert all(name in str(refused.value) for name in POLICIES)


def assigned_in_turn(policy: SchedulingPolicyName, *requests: Request) -> list[str]:
    """The jobs in the order in which an encoder with one slot gets them."""
    scheduler = make_scheduler(policy=policy)
    for made in requests:
        scheduler.accept(made, 0.0)
    scheduler.register(registration("encoder-0"), 0.0)
    order: list[str] = []
    while effects := [effect for effect in after(scheduler) if isinstance(effect, Assign)]:
        order += [effect.job_id for effect in effects]
        report = stored(scheduler.jobs[order[-1]].current_attempt, "encoder", len(order), issued=1 + len(order))
        assert scheduler.stored("encoder-0", report, 1.0)
    return order


@pytest.mark.parametrize(
    ("policy", "order"),
    [
        ("fifo", ["urgent/0", "long/0", "due/0", "a/0", "a/1", "b/0", "short/0"]),
        ("fair", ["urgent/0", "long/0", "a/0", "b/0", "a/1", "due/0", "short/0"]),
        ("shortest_remaining", ["urgent/0", "short/0", "a/0", "a/1", "b/0", "due/0", "long/0"]),
        ("deadline", ["urgent/0", "due/0", "long/0", "a/0", "a/1", "b/0", "short/0"]),
    ],
)
def test_the_policy_of_the_head_orders_the_waiting_jobs(policy: SchedulingPolicyName, order: list[str]) -> None:
    assert order == assigned_in_turn(
        policy,
        scheduled("long", steps=50),
        scheduled("due", steps=20, deadline_s=9.0),
        scheduled("a", steps=10, owner="alice", n=2),
        scheduled("b", steps=10, owner="bob"),
        scheduled("short", steps=4),
        scheduled("urgent", steps=60, owner="carol", priority=1),
    )


@given(st.sampled_from(get_args(SchedulingPolicyName)), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_no_waiting_job_is_overtaken_for_ever(policy: SchedulingPolicyName, older: int) -> None:
    scheduler = make_scheduler(policy=policy)
    scheduler.register(registration("encoder-0"), 0.0)
    for k in range(older):
        scheduler.accept(scheduled(f"older{k}", steps=60), 0.0)
    scheduler.accept(scheduled("last", priority=-100, steps=100), 0.0)
    assignments = 0
    while not scheduler.jobs["last/0"].instance:
        for k in range(2):  # more than is served
            request_ = scheduled(f"new{assignments}-{k}", priority=k, deadline_s=1.0, steps=1, owner=f"{assignments}")
            scheduler.accept(request_, 0.0)
        (job_id,) = [effect.job_id for effect in after(scheduler) if isinstance(effect, Assign)]
        assignments += 1
        assert assignments <= (older + 1) * (MAX_PASSED_OVER + 1)
        report = stored(scheduler.jobs[job_id].current_attempt, "encoder", assignments, issued=1 + assignments)
        if job_id != "last/0":
            assert scheduler.stored("encoder-0", report, 1.0)
