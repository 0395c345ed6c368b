"""The chaos tool's own judgement: each check must be able to fail."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import time
from asyncio.subprocess import Process
from pathlib import Path
from typing import Any, cast

import httpx
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from triptych.actors.child_state import ChildState
from triptych.actors.runtime.system_messages import ChildReport
from triptych.actors.topology import load_topology
from triptych.api.launch import Cluster
from triptych.engines.transfer import FaultRates
from triptych.roles.messages.common import Attempt, LeaseRef
from triptych.roles.messages.pool import LeaseView
from triptych.roles.messages.requests import ClusterView, InstanceView
from triptych.tools.chaos import invariants
from triptych.tools.chaos.__main__ import app
from triptych.tools.chaos.clock import Clock
from triptych.tools.chaos.faults import (
    FAULTS,
    Fault,
    components_of_victim,
    transfer_keys,
    transfer_rates,
    why_unsupported,
)
from triptych.tools.chaos.injector import FaultInjector, InjectedFault, has_recovered, trigger_is_met
from triptych.tools.chaos.load import LoadGenerator, Outcome
from triptych.tools.chaos.plan import IMAGES, PlannedFault, PlannedRequest, make_plan
from triptych.tools.chaos.report import FailedRequest, StepsRedone, failures, show, summary

HAPPY_PATH = (
    "ENCODER_WAITING", "ENCODER_RUNNING", "ENCODER_DONE", "DENOISING_WAITING", "DENOISING_RUNNING",
    "DENOISING_DONE", "DECODER_WAITING", "DECODER_RUNNING", "DONE",
)  # fmt: skip
INVARIANTS = (
    "each accepted request ended once", "each client saw one request", "every block is accounted for",
    "same seed, same bytes",
)  # fmt: skip
VICTIMS = {fault: ["a", "b"] for fault in FAULTS if not FAULTS[fault].rates}


def outcome(states: tuple[str, ...] = HAPPY_PATH, *, status: int = 200, causes: tuple[str, ...] = ()) -> Outcome:
    history = [{"state": state, "at": float(k), "reason": ""} for k, state in enumerate(states)]
    unit: dict[str, Any] = {
        "state": states[-1],
        "history": history,
        "causes": list(causes),
        "attempts": 1 + len(causes),
    }
    final_view = {"id": "r", "units": [unit]}
    return Outcome(
        PlannedRequest(1, 0.0, IMAGES[0]), status=status, request_ids={"r"}, digest="d", final_view=final_view
    )


def answered(began: float, ended: float) -> Outcome:
    return Outcome(PlannedRequest(1, 0.0, IMAGES[0]), began=began, ended=ended)


def injection(victim: str = "a", *, recovery_s: float | None = 1.0) -> InjectedFault:
    return InjectedFault("kill", victim, 0.0, lethal=True, recovery_s=recovery_s)


def test_a_clean_run_breaks_nothing() -> None:
    fine = [outcome()]
    assert invariants.each_accepted_request_ended_once(fine) == []
    assert invariants.each_client_saw_one_request(fine, {"r": "k"}) == []
    assert invariants.no_stale_report_was_accepted(fine) == []
    assert invariants.same_seed_same_bytes(fine, {IMAGES[0]: "d"}) == []
    assert invariants.failed_only_when_at_fault(fine) == []
    assert invariants.every_victim_recovered([injection()], 2.0) == []
    assert invariants.only_victims_restarted({"a": 1, "b": 0}, [injection()], []) == []


def test_a_lost_request_is_seen() -> None:
    silent = Outcome(PlannedRequest(1, 0.0, IMAGES[0]))
    forgotten = Outcome(PlannedRequest(1, 0.0, IMAGES[0]), status=200, request_ids={"r"})
    unfinished = outcome(HAPPY_PATH[:4])
    for lost in (silent, forgotten, unfinished, outcome(status=500)):
        assert len(invariants.each_accepted_request_ended_once([lost])) == 1


def test_a_doubled_request_is_seen() -> None:
    twice = outcome()
    twice.request_ids.add("s")
    assert len(invariants.each_client_saw_one_request([twice], {})) == 1
    assert len(invariants.each_client_saw_one_request([], {"r": "k", "s": "k"})) == 1


def test_a_leak_is_seen() -> None:
    pool = {"name": "pool", "capacity": 10, "free": 4, "leased": 6}
    held = LeaseView(LeaseRef("pool", 1, 1, 0, 64), "sealed", "encoder-0", 1, Attempt("r/0", 1))
    spare = LeaseView(LeaseRef("pool", 1, 2, 64, 64), "writing", "denoiser-0", 1, Attempt("", 0))
    writing = LeaseView(LeaseRef("pool", 1, 3, 128, 64), "writing", "encoder-0", 1, Attempt("r/1", 1))
    assert invariants.every_block_is_accounted_for([pool], [spare], 0) == []
    assert invariants.every_block_is_accounted_for([pool], [held, spare], 1) == []
    assert len(invariants.every_block_is_accounted_for([pool | {"free": 3}], [], 0)) == 1
    assert len(invariants.every_block_is_accounted_for([pool], [held], 0)) == 2
    assert len(invariants.every_block_is_accounted_for([pool], [writing], 1)) == 2
    assert len(invariants.every_block_is_accounted_for([pool], [], 1)) == 1, "it has something that is not there"


def test_an_illegal_history_is_seen() -> None:
    assert len(invariants.no_stale_report_was_accepted([outcome((*HAPPY_PATH[:2], "DONE"))])) == 1
    backwards = outcome()
    backwards.final_view["units"][0]["history"][0]["at"] = 99.0
    assert len(invariants.no_stale_report_was_accepted([backwards])) == 1


def test_other_bytes_are_seen() -> None:
    assert len(invariants.same_seed_same_bytes([outcome()], {IMAGES[0]: "e"})) == 1


def test_who_does_not_come_back_or_restarts_unasked_is_seen() -> None:
    assert len(invariants.every_victim_recovered([injection(recovery_s=None), injection(recovery_s=9.0)], 2.0)) == 2
    assert len(invariants.only_victims_restarted({"a": 2, "b": 1}, [injection()], [42])) == 3
    full = InjectedFault("full", "system", 0.0, lethal=False)
    assert len(invariants.only_victims_restarted({"a": 2, "b": 1}, [injection(), full], [])) == 1, "b was not struck"


def test_instances_may_restart_once_for_a_cut_and_a_host_that_was_off_counts_anew() -> None:
    cut = InjectedFault("isolate", "b", 0.0, lethal=False, may_restart=("a", "c"))
    off = InjectedFault("host", "b", 0.0, lethal=False, counts_anew=("a",))
    broken = invariants.only_victims_restarted
    assert broken({"a": 1, "b": 0}, [cut], []) == []
    assert len(broken({"a": 2, "b": 1}, [cut], [])) == 2
    assert broken({"a": 0}, [injection(), cut, off], []) == []
    assert broken({"a": 1}, [injection(), off, injection()], []) == []
    assert len(broken({"a": 2}, [injection(), off, injection()], [])) == 1


def test_a_fault_of_hosts_hits_what_runs_there_and_what_it_parts_from_the_head() -> None:
    topology = load_topology("examples/chaos-hosts.toml")
    on = {name: [component.name for component in topology.on_host(name)] for name in ("a", "b", "c")}
    everything = [component.name for component in topology.components]
    assert components_of_victim(topology, "host", "b") == on["b"]
    assert components_of_victim(topology, "host", "a") == on["a"]
    assert components_of_victim(topology, "flap", "a") == everything
    assert set(components_of_victim(topology, "cut", "b-c")) == {*on["b"], *on["c"]}
    assert components_of_victim(topology, "oneway", "c>b") == components_of_victim(topology, "oneway", "b>c")
    assert components_of_victim(topology, "kill", "encoder-0") == ["encoder-0"]
    assert FAULTS["cut"].victims(topology) == ["a-b", "a-c", "b-c"]
    assert not any(FAULTS[fault].victims(load_topology("examples/chaos.toml")) for fault in ("host", "cut", "oneway"))


@pytest.mark.parametrize("options", [["examples/chaos-hosts.toml"], ["--hosts", "2"]])
def test_a_topology_runs_on_as_many_hosts_as_it_has(options: list[str]) -> None:
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2
    assert "has 3 [[hosts]]" in result.output


def test_an_innocent_failure_is_seen() -> None:
    failed = (*HAPPY_PATH[:2], "FAILED")
    assert len(invariants.failed_only_when_at_fault([outcome(failed, causes=("x: boom",) * 3)])) == 1
    poison = ("a: its process ended", "b: its process ended")
    assert invariants.failed_only_when_at_fault([outcome(failed, causes=poison)]) == []


def test_a_request_that_failed_or_timed_out_is_listed_with_its_causes() -> None:
    causes = ("encoder-0: its process ended", "encoder-1: boom [/tmp]")
    forgotten = Outcome(PlannedRequest(2, 0.0, IMAGES[0]), request_ids={"s"})
    ended = [outcome((*HAPPY_PATH[:2], end), status=500, causes=causes) for end in ("FAILED", "TIMED_OUT", "CANCELLED")]
    found = failures([outcome(causes=causes), *ended, forgotten])
    assert found == tuple(
        FailedRequest(request_id="r", state=state, attempts=3, causes=causes) for state in ("FAILED", "TIMED_OUT")
    )


def test_the_causes_of_failures_are_in_the_report_and_on_the_screen() -> None:
    held: dict[str, list[str]] = {name: [] for name in INVARIANTS}
    failed = outcome((*HAPPY_PATH[:2], "FAILED"), status=500, causes=("encoder-0: boom [/tmp]",))
    report = summary(7, 60.0, [outcome(), *[failed] * 12], [], 0, held)
    assert (report.done, report.failed, len(report.failures)) == (1, 12, 12)
    assert msgspec.json.decode(msgspec.json.encode(report))["failures"][0] == {
        "request_id": "r", "state": "FAILED", "attempts": 2, "causes": ["encoder-0: boom [/tmp]"],
    }  # fmt: skip
    console = Console(file=io.StringIO(), width=200)
    show(report, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count("FAILED after 2 attempts: r") == 10
    assert "encoder-0: boom [/tmp]" in shown
    assert "and 2 more" in shown


def test_the_report_has_the_steps_that_were_redone_and_where_jobs_went_on() -> None:
    ended = [outcome() for _ in range(3)]
    for each, resumed_from, redone in zip(ended, (80, 0, 9), (4, 0, 7), strict=True):
        each.final_view["units"][0] |= {"total_steps": 100, "resumed_from": resumed_from, "steps_redone": redone}
    report = summary(7, 60.0, ended, [], 0, {name: [] for name in INVARIANTS})
    found = StepsRedone(steps=300, redone=11, jobs_redoing=2, jobs_resumed=2, resumed_from=("9 of 100", "80 of 100"))
    assert report.denoising == found
    console = Console(file=io.StringIO(), width=200)
    show(report, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "11 of 300 denoising steps redone, in 2 jobs; 2 went on from a checkpoint: 9 of 100, 80 of 100" in shown


class OneProcess:
    """A target with one component, a process that reads its stdin to the end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.topology = load_topology("examples/chaos.toml")
        self.process = process
        self.asked: list[float] = []

    async def child(self, name: str) -> ChildReport:
        self.asked.append(time.time())
        generation = 1 if self.process.poll() is None else 2
        return ChildReport(name, "denoiser", self.process.pid, generation, ChildState.READY, 0, "", 0.0, silence_s=0.0)

    def process_id(self, child: ChildReport) -> int:
        return child.pid


def test_a_fault_is_dated_when_nothing_is_left_to_ask() -> None:
    async def scenario(target: OneProcess) -> None:
        injector = FaultInjector(cast("Any", target), seed=0)
        try:
            await injector.inject(PlannedFault(0.0, "kill", "denoiser-0", "any", False))
        finally:
            injector.close()
        (injected,) = injector.injected
        assert injected.recovery_s is not None
        assert injected.at >= target.asked[0], "the head, which is not there, was asked for a second before"

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        asyncio.run(scenario(OneProcess(process)))


@pytest.mark.parametrize("step_s", [0.0, 3600.0, -3600.0])
def test_a_step_of_the_clock_is_no_delay(step_s: float) -> None:
    ended = outcome(("DENOISING_RUNNING", "DENOISING_WAITING", "DENOISING_RUNNING", "DONE"))
    moves = ended.final_view["units"][0]["history"]
    moves[1] |= {"at": 2.5, "reason": "a: its process ended"}
    moves[2] |= {"at": 3.0 + step_s}
    kill = InjectedFault("kill", "a", 2.0, lethal=True, recovery_s=1.0)
    report = summary(7, 60.0, [ended], [kill], 1, {name: [] for name in INVARIANTS})
    assert (report.seen_p99_s, report.redispatched_p99_s) == (0.5, None if step_s else 0.5)


def test_what_the_checks_must_know_of_a_fault_is_in_its_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAULTS, "new", Fault(lethal=True, silent=True, hinders_starts=True))
    new = InjectedFault("new", "b", 0.0, lethal=True, recovery_s=9.0)
    report = summary(7, 60.0, [outcome()], [injection(), new], 2, {name: [] for name in INVARIANTS})
    assert (report.recovery_p99_s, report.recovery_by_fault_s) == (1.0, {"kill": 1.0, "new": 9.0})
    assert invariants.only_victims_restarted({"a": 2, "b": 1}, [injection(), new], []) == []


def test_a_mailbox_over_its_bound_is_seen() -> None:
    assert len(invariants.no_mailbox_overflowed({"head": (11, 10), "api": (10, 10)})) == 1


@given(st.integers(0, 2**32), st.floats(5, 60), st.floats(0.5, 5))
def test_a_seed_plans_one_run_and_every_fault_gets_its_turn(seed: int, duration_s: float, every_s: float) -> None:
    faults = tuple(VICTIMS)
    plan = make_plan(seed, duration_s, 4, every_s, faults, VICTIMS)
    assert plan == make_plan(seed, duration_s, 4, every_s, faults, VICTIMS)
    assert all(0 <= planned.at_s < duration_s for planned in plan.requests)
    turns = [planned.fault for planned in plan.faults]
    for k in range(0, len(turns) - len(faults) + 1, len(faults)):
        assert set(turns[k : k + len(faults)]) == set(faults)


def test_transfers_are_late_only_where_bytes_travel(tmp_path: Path) -> None:
    assert "late" not in why_unsupported(list(FAULTS), "mooncake", tmp_path)
    assert "late" in why_unsupported(list(FAULTS), "shm", tmp_path)
    assert transfer_rates(["kill", "pool"]) == ""
    faults = FaultRates.parse(transfer_rates(FAULTS))
    assert faults.flip > 0
    assert faults.short > 0
    assert faults.delay > 0
    assert faults.delay_s > float(str(transfer_keys(["late"])["pull_timeout_s"])), (
        "what is late comes after its timeout"
    )
    assert FaultRates.parse(transfer_rates(["late"])) == FaultRates(delay=faults.delay, delay_s=faults.delay_s)


def test_the_load_carries_the_key_of_the_cluster() -> None:
    async def headers() -> httpx.Headers:
        cluster = Cluster(load_topology("examples/chaos.toml"), cast("Process", None), "secret")
        return LoadGenerator(cluster, "chaos", 1.0)._http.headers

    assert asyncio.run(headers())["authorization"] == "Bearer secret"


@pytest.mark.parametrize(("fault", "sentence"), [("late", "nothing is late"), ("typo", "is none of")])
def test_a_fault_that_cannot_be_caused_is_refused(fault: str, sentence: str) -> None:
    result = CliRunner().invoke(app, ["examples/chaos.toml", "--faults", f"kill,{fault}"])
    assert result.exit_code == 2
    assert sentence in result.output


def test_a_disk_is_filled_only_where_it_is_one_of_its_own(tmp_path: Path) -> None:
    assert why_unsupported(["full", "kill"], "shm", tmp_path).keys() == {"full"}


@pytest.mark.skipif(bool(Clock.why_unsupported()), reason=Clock.why_unsupported())
def test_processes_under_a_clock_follow_it_and_no_others_do(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    program = "import time; input(); print(time.time()); input(); print(time.time())"
    with clock.preloaded():
        process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
    assert process.stdin
    assert process.stdout
    with process:
        ahead = []
        for step in (3600, -7200):
            clock.step(step)
            process.stdin.write("\n")
            process.stdin.flush()
            ahead.append(round((float(process.stdout.readline()) - time.time()) / 3600))
    assert ahead == [1, -1]


def test_a_standstill_is_seen_and_idle_time_is_none() -> None:
    assert invariants.no_request_stalled([answered(0, 1), answered(50, 52), answered(51, 55)], 5.0) == []
    assert len(invariants.no_request_stalled([answered(0, 1), answered(0, 9)], 5.0)) == 1
    assert len(invariants.no_request_stalled([answered(0, 9), answered(8, 10)], 5.0)) == 1


def test_the_moment_is_the_victims_own() -> None:
    busy = InstanceView("denoiser-0", "denoiser", 1, 1, 2, ("r/0",))
    idle = InstanceView("denoiser-1", "denoiser", 1, 2, 2, ())
    view = ClusterView(True, (), (busy, idle), {"DENOISING_RUNNING": 1}, 0, 0.0)

    def falls(victim: str, moment: str) -> bool:
        return trigger_is_met(PlannedFault(0.0, "kill", victim, moment, False), view)

    assert falls("denoiser-0", "running")
    assert not falls("denoiser-1", "running")
    assert falls("head", "running")
    assert falls("pool", "stored")
    assert not falls("head", "idle")


def test_a_victim_is_hit_again_only_after_its_supervisor_has_heard_it() -> None:
    def child(generation: int, state: ChildState = ChildState.READY, silence_s: float = 0.1) -> ChildReport:
        return ChildReport("a", "encoder", 7, generation, state, 0, "", 0.0, silence_s=silence_s)

    def recovered(now: ChildReport, *, lethal: bool) -> bool:
        return has_recovered(child(1), now, since_s=0.5, lethal=lethal)

    assert recovered(child(1), lethal=False)
    assert not recovered(child(1, silence_s=2.0), lethal=False), "a second stall would make one of twice the length"
    assert not recovered(child(1), lethal=True)
    assert recovered(child(2, silence_s=2.0), lethal=True)
    assert not recovered(child(2, ChildState.STARTING), lethal=True)
