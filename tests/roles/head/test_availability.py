from __future__ import annotations

import pytest

from triptych.actors import Component
from triptych.actors.runtime.system_messages import ChildReport
from triptych.roles.head.availability import release_mismatch, unavailable_reason
from triptych.roles.messages.stages import Hello


def component(name: str, kind: str, pool: str = "") -> Component:
    slots = 0 if kind in ("pool", "head") else 2
    return Component(name=name, kind=kind, address="", port=0, slots=slots, pool=pool)  # type: ignore[arg-type]


ROLES = (("e-0", "encoder"), ("d-0", "denoiser"), ("d-1", "denoiser"))
COMPONENTS = [
    component("pool", "pool"),
    *(component(name, kind, "pool") for name, kind in ROLES),
    component("head", "head"),
]
ON_HOSTS = [
    component("pool-a", "pool"),
    component("pool-b", "pool"),
    component("e-0", "encoder", "pool-a"),
    component("d-0", "denoiser", "pool-a"),
    component("d-1", "denoiser", "pool-b"),
]


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        ({}, ""),
        ({"d-0": "gave_up"}, ""),
        ({"d-0": "gave_up", "d-1": "backoff"}, ""),
        ({"d-0": "gave_up", "d-1": "failed"}, "no denoiser is started any more (d-0: why)"),
        ({"pool": "failed"}, "pool is not started any more (why)"),
        ({"head": "gave_up"}, ""),
    ],
)
def test_nothing_can_be_served_without_a_pool_or_the_last_of_a_kind(states: dict[str, str], reason: str) -> None:
    children = [ChildReport(name, "", 0, 1, state, 5, "why", 0.0) for name, state in states.items()]
    assert unavailable_reason(COMPONENTS, children) == reason


@pytest.mark.parametrize(
    ("states", "reason"),
    [
        ({"pool-b": "failed"}, ""),
        ({"pool-a": "failed"}, "pool-a is not started any more (why)"),
        ({"pool-b": "failed", "d-0": "gave_up"}, "no denoiser is started any more (d-0: why)"),
    ],
)
def test_the_pool_of_one_host_ends_what_is_there_and_nothing_else(states: dict[str, str], reason: str) -> None:
    children = [ChildReport(name, "", 0, 1, state, 5, "why", 0.0) for name, state in states.items()]
    assert unavailable_reason(ON_HOSTS, children) == reason


@pytest.mark.parametrize(
    ("hello", "said"),
    [
        (Hello("2.1", "t", "b"), ""),
        (Hello("2.0", "t", "b"), "d-0 on host b runs Triptych 2.0, and the head on host a 2.1: install the same"),
        (Hello("2.1", "u", "b"), "d-0 on host b has read another topology (u) than the head on host a (t): give both"),
    ],
)
def test_a_mismatch_says_which_host_runs_what(hello: Hello, said: str) -> None:
    mismatch = release_mismatch("d-0", hello, host="a", version="2.1", topology="t")
    assert mismatch.startswith(said)
    assert bool(mismatch) == bool(said)
