"""The result of a run: a JSON object and a table."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Final

import msgspec
from rich.console import Console
from rich.table import Table

from triptych.percentile import percentile
from triptych.roles.head.job import State
from triptych.tools.chaos.faults import FAULTS
from triptych.tools.chaos.injector import InjectedFault
from triptych.tools.chaos.invariants import first_job
from triptych.tools.chaos.load import Outcome

MAX_SHOWN: Final = 10
MAX_DELAY_S: Final = 60.0


class FailedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request without an image."""

    request_id: str
    state: str
    """FAILED or TIMED_OUT."""
    attempts: int
    causes: tuple[str, ...]
    """Why each attempt ended, oldest first."""


class StepsRedone(msgspec.Struct, frozen=True, kw_only=True):
    """What lost denoisers cost; a job that several lost is counted once."""

    steps: int
    """Denoising steps in the images that were made, each counted once."""
    redone: int
    """Those that were computed again."""
    jobs_redoing: int
    """Jobs that had to compute a step again."""
    jobs_resumed: int
    """Jobs whose last denoise went on from a checkpoint."""
    resumed_from: tuple[str, ...]
    """Where they did: "STEP of STEPS", by step."""


class ChaosReport(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one run; times in seconds."""

    seed: int
    duration_s: float
    accepted: int
    done: int
    failed: int
    lost: int
    doubled: int
    leaked: int
    different: int
    retries: int
    faults: dict[str, int]
    failures: tuple[FailedRequest, ...]
    recovery_p50_s: float
    recovery_p99_s: float
    recovery_by_fault_s: dict[str, float]
    """Median recovery by fault; a stopped process is noticed only after the heartbeat timeout."""
    kills_hit: float
    """Share of the kills of roles that hit one with a job assigned."""
    seen_p99_s: float | None
    """Seconds from a kill until the head retries the stage; None if no kill hit a running stage."""
    redispatched_p99_s: float | None
    """Seconds from there until the stage runs on another instance; None as above."""
    restarts: int
    denoising: StepsRedone
    deadlines_met: float | None
    """Share of the requests with a deadline; None if none had one."""
    previews: int
    """Previews that the requests ended with."""
    invariants: dict[str, list[str]]
    """The violations of each invariant, by name."""

    @property
    def held(self) -> bool:
        """Whether no invariant was violated."""
        return not any(self.invariants.values())


def summary(
    seed: int,
    duration_s: float,
    outcomes: Sequence[Outcome],
    injected: Sequence[InjectedFault],
    restarts: int,
    invariants: dict[str, list[str]],
) -> ChaosReport:
    """Make the report from what was observed; pure."""
    kills = [b for b in injected if b.fault == "kill"]
    recoveries = [
        b.recovery_s for b in injected if b.recovery_s is not None and b.lethal and not FAULTS[b.fault].silent
    ]
    seen, redispatched = _delays(outcomes, injected)
    faults = {
        fault: [b.recovery_s for b in injected if b.fault == fault and b.recovery_s] for fault in _faults(injected)
    }
    return ChaosReport(
        seed=seed,
        duration_s=duration_s,
        accepted=sum(bool(o.request_ids) for o in outcomes),
        done=sum(o.status == 200 for o in outcomes),
        failed=sum((first_job(o) or {}).get("state") == State.FAILED for o in outcomes),
        lost=len(invariants["each accepted request ended once"]),
        doubled=len(invariants["each client saw one request"]),
        leaked=len(invariants["every block is accounted for"]),
        different=len(invariants["same seed, same bytes"]),
        retries=sum(o.retries for o in outcomes),
        faults=dict(Counter(b.fault for b in injected)),
        failures=failures(outcomes),
        recovery_p50_s=percentile(recoveries, 50),
        recovery_p99_s=percentile(recoveries, 99),
        recovery_by_fault_s={fault: statistics.median(times) for fault, times in faults.items() if times},
        kills_hit=sum(b.hit for b in kills) / len(kills) if kills else 0.0,
        seen_p99_s=percentile(seen, 99) if seen else None,
        redispatched_p99_s=percentile(redispatched, 99) if redispatched else None,
        restarts=restarts,
        denoising=steps_redone(outcomes),
        deadlines_met=_share_met(outcomes),
        previews=sum(len((first_job(o) or {}).get("previews", ())) for o in outcomes),
        invariants=invariants,
    )


def failures(outcomes: Iterable[Outcome]) -> tuple[FailedRequest, ...]:
    """List the requests that failed or timed out, as the head describes them."""
    units = [(outcome.final_view.get("id", ""), first_job(outcome) or {}) for outcome in outcomes]
    return tuple(
        FailedRequest(request_id=name, state=unit["state"], attempts=unit["attempts"], causes=tuple(unit["causes"]))
        for name, unit in units
        if unit.get("state") in (State.FAILED, State.TIMED_OUT)
    )


def steps_redone(outcomes: Iterable[Outcome]) -> StepsRedone:
    """Add up what the head says of the denoises of each request."""
    jobs = [job for outcome in outcomes if (job := first_job(outcome))]
    resumed = sorted((job["resumed_from"], job["total_steps"]) for job in jobs if job.get("resumed_from"))
    redone = [job.get("steps_redone", 0) for job in jobs]
    return StepsRedone(
        steps=sum(job.get("total_steps", 0) for job in jobs if job["state"] == State.DONE),
        redone=sum(redone),
        jobs_redoing=sum(bool(steps) for steps in redone),
        jobs_resumed=len(resumed),
        resumed_from=tuple(f"{step} of {steps}" for step, steps in resumed),
    )


def _share_met(outcomes: Iterable[Outcome]) -> float | None:
    met = [o.final_view["deadline_met"] for o in outcomes if o.final_view.get("deadline_met") is not None]
    return sum(met) / len(met) if met else None


def _faults(injected: Iterable[InjectedFault]) -> list[str]:
    return list(dict.fromkeys(injection.fault for injection in injected))


def _delays(outcomes: Iterable[Outcome], injected: Sequence[InjectedFault]) -> tuple[list[float], list[float]]:
    """Return the delays of stages that were running when their instance was killed."""
    seen, redispatched = [], []
    injected = sorted(injected, key=lambda injection: injection.at)
    for outcome in outcomes:
        moves: list[dict[str, Any]] = (first_job(outcome) or {"history": []})["history"]
        for k, (running, waiting) in enumerate(pairwise(moves)):
            if not (running["state"].endswith("RUNNING") and "process ended" in waiting["reason"]):
                continue
            victim = waiting["reason"].partition(":")[0]
            # Where the clock was set in between, a difference means nothing.
            before = [
                b for b in injected if b.victim == victim and b.lethal and 0 <= waiting["at"] - b.at < MAX_DELAY_S
            ]
            # Only a kill ends a process at once: one that is stopped or asked to end takes its time.
            if before and before[-1].fault == "kill":
                seen.append(waiting["at"] - before[-1].at)
                again = [m["at"] - waiting["at"] for m in moves[k + 2 :] if m["state"].endswith("RUNNING")][:1]
                redispatched += [delay for delay in again if 0 <= delay < MAX_DELAY_S]
    return seen, redispatched


def show(report: ChaosReport, console: Console) -> None:
    """Print the tables."""
    counts = Table("accepted", "done", "failed", "lost", "doubled", "leaked", "different", "retries", "restarts")
    counts.add_row(
        *(str(getattr(report, column.header)) for column in counts.columns),  # type: ignore[arg-type]
    )
    console.print(counts)
    faults = Table("fault", "injected", "back after (median s)")
    for fault, n in report.faults.items():
        faults.add_row(fault, str(n), f"{report.recovery_by_fault_s.get(fault, 0):.2f}")
    console.print(faults)
    console.print(f"recovery p50 {report.recovery_p50_s:.2f} s, p99 {report.recovery_p99_s:.2f} s (stops apart)")
    console.print(f"{report.kills_hit:.0%} of the kills hit a role with a job assigned")
    console.print(
        f"a running stage's kill seen p99 {_ms(report.seen_p99_s)}, running elsewhere p99 "
        f"{_ms(report.redispatched_p99_s)} later"
    )
    denoising = report.denoising
    console.print(
        f"{denoising.redone} of {denoising.steps} denoising steps redone, in {denoising.jobs_redoing} jobs; "
        f"{denoising.jobs_resumed} went on from a checkpoint: {', '.join(denoising.resumed_from) or 'none'}"
    )
    if report.deadlines_met is not None:
        console.print(f"{report.deadlines_met:.0%} of the deadlines met")
    console.print(f"{report.previews} previews")
    for failure in report.failures[:MAX_SHOWN]:
        console.print(f"{failure.state} after {failure.attempts} attempts: {failure.request_id}", markup=False)
        for cause in failure.causes:
            console.print(f"        {cause}", markup=False)
    if len(report.failures) > MAX_SHOWN:
        console.print(f"and {len(report.failures) - MAX_SHOWN} more")
    for name, broken in report.invariants.items():
        console.print(f"[green]held[/green]    {name}" if not broken else f"[red]BROKEN[/red]  {name}")
        for sentence in broken[:MAX_SHOWN]:
            console.print(f"        {sentence}", markup=False)


def _ms(seconds: float | None) -> str:
    return "(none was hit)" if seconds is None else f"{seconds * 1000:.0f} ms"
