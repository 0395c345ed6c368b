"""The simulation of scheduling policies, on a short trace."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from triptych.actors.topology.sections import SchedulingPolicyName
from triptych.tools.simulate.__main__ import main
from triptych.tools.simulate.policies import Costs, Simulation, System, make_trace, summarize

COSTS = Costs()


def figures(policy: SchedulingPolicyName, **options: int) -> dict[str, float]:
    return summarize(Simulation(System(policy, **options)).run(make_trace(200, 0.65, 1)), COSTS)


def test_deadlines_are_met_more_often_under_deadline_and_short_requests_do_not_wait_under_shortest_remaining() -> None:
    fifo, deadline, shortest = figures("fifo"), figures("deadline"), figures("shortest_remaining")
    assert 0.5 < fifo["attainment"] < 0.7
    assert deadline["attainment"] >= 1.3 * fifo["attainment"]
    assert shortest["slowdown_4"] <= 3
    assert shortest["mean_s"] <= fifo["mean_s"]
    assert figures("deadline") == deadline, "a trace and its outcome depend on the seed alone"


@pytest.mark.parametrize("policy", get_args(SchedulingPolicyName))
def test_every_request_ends_and_an_idle_system_takes_the_time_alone(policy: SchedulingPolicyName) -> None:
    trace = make_trace(60, 2.0, 0)
    ended = Simulation(System(policy, denoisers=2, slots=4, max_batch=4)).run(trace)
    assert sorted(outcome.arrival.at for outcome in ended) == [arrival.at for arrival in trace]
    (alone,) = Simulation(System(policy)).run(trace[:1])
    assert alone.latency_s == pytest.approx(COSTS.alone_s(trace[0].steps, trace[0].size))


def test_the_command_prints_a_line_for_each_policy(capsys: pytest.CaptureFixture[str]) -> None:
    trace = ["policies", "--requests", "20", "--load", "0.5"]
    assert main([*trace, "--json", "--policy", "fifo", "--policy", "fair"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["policy"] for row in rows] == ["fifo", "fair"]
    assert main(trace) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 + 4


def test_the_real_head_is_driven_without_a_bus_and_ends_all_requests(capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--instances",
        "3",
        "20",
        "--in-flight",
        "30",
        "--requests",
        "40",
        "--priorities",
        "2",
    ]
    assert main(["head", *options, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["instances"] for row in rows] == [3, 20]
    assert all(row["requests"] >= 40 and row["event_us"] > 0 for row in rows)
