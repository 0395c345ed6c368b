"""When silence counts."""

from __future__ import annotations

import pytest

from triptych.actors.runtime.system_messages import ChildReport
from triptych.actors.supervision import ComponentSpec
from triptych.actors.supervision._child import Child, unservable_reason
from triptych.actors.topology import Component


@pytest.fixture
def child() -> Child:
    made = Child(Component(name="a", kind="head", address="ipc:///a", port=1), ComponentSpec("a:b"))
    made.begin_incarnation(1)
    return made


def test_the_silence_of_a_start_has_a_bound_of_its_own(child: Child) -> None:
    assert child.hang_reason(-1.0, 600.0) == ""
    child.record_state("loading", "")
    child.record_heartbeat(None)
    assert child.hang_reason(-1.0, 600.0) == ""
    assert child.hang_reason(15.0, -1.0) == "hung: no heartbeat for -1 s while it started"


@pytest.mark.parametrize("told", ["ready", "start"])
def test_who_is_ready_or_has_started_is_bound_by_heartbeats(child: Child, told: str) -> None:
    if told == "ready":
        child.record_state("ready", "")
    else:  # an instance that has started, and is not registered of a head yet
        child.record_state("joining", "waiting for the head")
        assert child.record_heartbeat({"import": 1.0})
    assert child.hang_reason(-1.0, 600.0) == "hung: no heartbeat for -1 s"
    assert child.record_heartbeat({"import": 1.0}) == (told == "ready")
    assert not child.record_heartbeat({"import": 1.0})
    assert child.start_s["import"] == 1.0


def test_work_that_is_overdue_while_it_starts_is_believed(child: Child) -> None:
    child.record_state("hung", "loading the model takes more than 600 s")
    assert child.hang_reason(-1.0, 600.0) == "hung: no heartbeat for -1 s"


def reported(name: str, state: str, reason: str = "") -> ChildReport:
    return ChildReport(name, name.partition("-")[0], 0, 1, state, 0, reason, 0.0)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({}, ""),
        ({"denoiser-0": "failed"}, ""),
        ({"denoiser-0": "failed", "denoiser-1": "delayed"}, ""),
        ({"denoiser-0": "gave_up", "denoiser-1": "gave_up"}, ""),
        ({"denoiser-0": "gave_up", "denoiser-1": "failed"}, "denoiser-1 cannot start: why"),
        ({"head": "failed", "encoder-0": "failed"}, "encoder-0 cannot start: why"),
        ({"api": "failed"}, "api cannot start: why"),
    ],
)
def test_a_system_can_never_serve_when_no_instance_of_a_kind_can_start(changed: dict[str, str], problem: str) -> None:
    names = ("pool", "encoder-0", "denoiser-0", "denoiser-1", "decoder-0", "head", "api")
    assert unservable_reason(reported(name, changed.get(name, "ready"), "why") for name in names) == problem


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"denoiser-0": "failed"}, ""),
        ({"denoiser-0": "failed", "decoder-0": "gave_up"}, "denoiser-0 cannot start: why"),
        ({"pool-b": "failed"}, "pool-b cannot start: why"),
    ],
)
def test_a_host_is_of_use_while_an_instance_of_any_role_may_run_there(changed: dict[str, str], problem: str) -> None:
    children = [reported(name, changed.get(name, "ready"), "why") for name in ("pool-b", "denoiser-0", "decoder-0")]
    assert unservable_reason(children, {"encoder", "denoiser", "decoder"}) == problem


def test_while_the_system_stops_an_instance_is_not_joining(child: Child) -> None:
    child.record_state("ready", "")
    child.record_state("joining", "waiting for the head", closing=True)
    assert child.state == "ready"
    child.record_state("draining", "", closing=True)
    assert child.state == "draining"
