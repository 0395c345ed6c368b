"""The runs of a job: which instance had which of its stages, and when."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.roles.factories import after, finished, make_scheduler, registration, request, stored
from triptych.engines.parameters.schema import Signature
from triptych.engines.stages import Stage
from triptych.roles.head.job import Job
from triptych.roles.head.journal import decode_job, encode_job
from triptych.roles.head.registry import ExitCause
from triptych.roles.head.runs import MAX_MARKS, MAX_RUNS, assign, end, start, step
from triptych.roles.head.scheduler import JobScheduler
from triptych.roles.messages.requests import RunView, StepMark
from triptych.roles.messages.stages import RegisterInstance


def encoded() -> tuple[JobScheduler, Job]:
    """A job that is encoded from 10 s to 12 s and waits for a denoiser."""
    scheduler = make_scheduler()
    for name in ("encoder-0", "decoder-0"):
        scheduler.register(registration(name), 0.0)
    scheduler.accept(request(), 9.0)
    (job,) = scheduler.jobs.values()
    after(scheduler, 10.0)
    scheduler.started(job.current_attempt, "encoder-0", Stage.ENCODER, 11.0, 0.25)
    scheduler.stored("encoder-0", stored(job.current_attempt, "encoder", 1), 12.0)
    return scheduler, job


def test_every_run_of_a_job_is_kept_with_its_times_also_one_that_was_lost() -> None:
    scheduler, job = encoded()
    assert job.runs == [RunView("encoder", "encoder-0", 1, 10.0, 10.75, 11.0, 11.5, 12.0)]
    scheduler.register(registration("denoiser-0"), 19.0)
    after(scheduler, 20.0)
    scheduler.started(job.current_attempt, "denoiser-0", Stage.DENOISER, 21.0)
    for number in (1, 2, 3, 2):
        scheduler.progress(job.current_attempt, number, 4, 21.0 + number)
    scheduler.instance_down("denoiser-0", "killed", 25.0, ExitCause.CRASHED)
    lost = job.runs[1]
    assert (lost.ended_at, lost.computed_at, lost.reason) == (25.0, 0.0, "denoiser-0: killed")
    assert lost.steps == (StepMark(1, 22.0), StepMark(2, 23.0), StepMark(3, 24.0)), "the last one was overtaken"
    scheduler.register(registration("denoiser-0", generation=2), 29.0)
    after(scheduler, 30.0)
    assert [(run.attempt, run.assigned_at, run.ended_at) for run in job.runs[2:]] == [(2, 30.0, 0.0)]
    scheduler.stored("denoiser-0", stored(job.current_attempt, "denoiser", 2), 33.0)
    unseen = job.runs[2]
    assert (unseen.loaded_at, unseen.started_at, unseen.computed_at) == (32.5, 32.5, 33.0), "its start was never told"
    assert unseen.steps == (StepMark(4, 33.0),), "nor its last step"
    after(scheduler, 34.0)
    scheduler.finished("decoder-0", finished(job.current_attempt), 35.0)
    assert [run.stage for run in job.view().runs] == ["encoder", "denoiser", "denoiser", "decoder"]
    assert all(run.ended_at for run in job.runs)
    assert decode_job(encode_job(job)).runs == job.runs


def test_the_stages_of_a_monolithic_instance_are_runs_of_their_own() -> None:
    scheduler = make_scheduler()
    whole = RegisterInstance("mono-0", "monolithic", 1, 1, 1, 1, 0, pool="", signature=Signature(), running=())
    scheduler.register(whole, 0.0)
    scheduler.accept(request(), 0.0)
    after(scheduler, 1.0)
    (job,) = scheduler.jobs.values()
    for number, stage in enumerate(Stage, start=2):
        scheduler.started(job.current_attempt, "mono-0", stage, float(number))
    scheduler.finished("mono-0", finished(job.current_attempt), 5.0)
    assert [(run.stage, run.assigned_at, run.started_at, run.ended_at) for run in job.runs] == [
        ("encoder", 1.0, 2.0, 3.0),
        ("denoiser", 3.0, 3.0, 4.0),
        ("decoder", 4.0, 4.0, 5.0),
    ]


@pytest.mark.parametrize("steps", [1, MAX_MARKS, MAX_MARKS + 1, 5 * MAX_MARKS + 3, 1000])
def test_the_marks_of_many_steps_are_at_equal_distances(steps: int) -> None:
    runs: list[RunView] = []
    assign(runs, Stage.DENOISER, "denoiser-0", 1, 0.0)
    start(runs, Stage.DENOISER, 0.0, 0.0)
    for number in range(1, steps + 1):
        step(runs, number, float(number))
    marks = [mark.step for mark in runs[0].steps]
    assert (marks[0], marks[-1]) == (1, steps)
    assert len(marks) <= MAX_MARKS + 1
    assert len(marks) >= min(steps, MAX_MARKS // 2)
    assert len({after - before for before, after in pairwise(marks[:-1])}) <= 1


def test_only_the_newest_runs_are_kept_and_what_is_told_after_the_end_changes_nothing() -> None:
    runs: list[RunView] = []
    for number in range(MAX_RUNS + 5):
        assign(runs, Stage.DENOISER, "denoiser-0", number, 0.0)
        end(runs, 1.0, reason="parked")
    assert (len(runs), runs[0].attempt) == (MAX_RUNS, 5)
    before = list(runs)
    start(runs, Stage.DENOISER, 2.0, 0.0)
    step(runs, 1, 2.0)
    end(runs, 2.0, seconds=1.0)
    assert runs == before
