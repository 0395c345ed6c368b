from __future__ import annotations

import pytest

from triptych.engines.stages import Stage
from triptych.roles.head import runs
from triptych.roles.head.head_metrics import (
    StageTimes,
    computed,
    head_metrics,
    instance_metrics,
    recoveries,
    waits,
)
from triptych.roles.head.job import Job, Request, State
from triptych.roles.head.registry import ExitCause
from triptych.roles.messages.common import Output
from triptych.roles.messages.requests import InstanceView, PromptCacheView

WAY = [
    (State.ENCODER_WAITING, 0), (State.ENCODER_RUNNING, 2), (State.ENCODER_DONE, 3), (State.DENOISING_WAITING, 3),
    (State.DENOISING_RUNNING, 7), (State.DENOISING_WAITING, 10), (State.DENOISING_RUNNING, 10.5),
]  # fmt: skip


def job(moves: list[tuple[State, float]]) -> Job:
    made = Job("r/0", "r", 0, 0, state=State.PENDING)
    for state, at in moves:
        made.transition(state, at)
    return made


def test_what_waits_and_recovers_is_read_off_the_moves_and_the_runs():
    one = job([(state, 100 + at) for state, at in WAY])
    for stage, assigned_at, ended_at in ((Stage.ENCODER, 1, 3), (Stage.DENOISER, 5, 6), (Stage.DENOISER, 6.5, 10)):
        runs.assign(one.runs, stage, "any", 1, 100 + assigned_at)
        runs.end(one.runs, 100 + ended_at, reason="any: refused")
    runs.assign(one.runs, Stage.DENOISER, "any", 3, 110.25)
    waited = [(Stage.ENCODER, 1), (Stage.DENOISER, 2), (Stage.DENOISER, 0.5), (Stage.DENOISER, 0.25)]
    assert list(waits(one)) == waited, "until it was assigned, not until it ran"
    assert list(recoveries(one)) == [(Stage.DENOISER, 0.5)]


@pytest.mark.parametrize("why", [runs.PARKED, ExitCause.STOPPED.value])
def test_what_an_instance_gives_back_was_not_lost(why):
    one = job(WAY[:5])
    one.transition(State.DENOISING_WAITING, 10, f"denoiser-0: {why}")
    one.transition(State.DENOISING_RUNNING, 12)
    assert list(recoveries(one)) == []
    one.transition(State.DENOISING_WAITING, 13, f"denoiser-0: {ExitCause.CRASHED}")
    one.transition(State.DENOISING_RUNNING, 14)
    assert list(recoveries(one)) == [(Stage.DENOISER, 1)]


def test_a_stage_whose_input_was_lost_recovers_when_it_runs_again():
    moves = [*WAY[:5], (State.ENCODER_WAITING, 8), (State.ENCODER_RUNNING, 9), *[(s, t + 7) for s, t in WAY[2:5]]]
    assert list(recoveries(job(moves))) == [(Stage.DENOISER, 6)]


@pytest.mark.parametrize("end", [State.FAILED, State.CANCELLED, State.TIMED_OUT])
def test_an_end_is_no_loss(end):
    assert list(recoveries(job([*WAY[:5], (end, 9)]))) == []


def sample(families, name: str, **labels: str) -> float:
    (found,) = [one.value for family in families for one in family.samples if one.name == name and one.labels == labels]
    return found


def test_what_was_computed_is_of_runs_that_made_something_also_of_an_instance_that_has_all_stages():
    one = job([])
    runs.assign(one.runs, Stage.DENOISER, "denoiser-0", 1, 10)
    runs.start(one.runs, Stage.DENOISER, 11, 0)
    runs.end(one.runs, 12, reason="denoiser-0: its process ended")
    runs.assign(one.runs, Stage.ENCODER, "monolithic-0", 2, 20)
    for at, stage in enumerate(Stage, start=21):
        runs.start(one.runs, stage, at, 0)
    runs.end(one.runs, 25, seconds=1.5)
    assert list(computed(one)) == [(Stage.ENCODER, 1), (Stage.DENOISER, 1), (Stage.DECODER, 1.5)]


def test_a_clock_that_is_set_back_does_not_change_what_a_stage_has_taken():
    one = job([])
    runs.assign(one.runs, Stage.DENOISER, "denoiser-0", 1, 100)
    runs.start(one.runs, Stage.DENOISER, 101, 0)
    runs.end(one.runs, 50, seconds=1.5)
    one.stage_seconds["denoiser"] = 1.5
    assert list(computed(one)) == [(Stage.DENOISER, 1.5)]


def test_the_work_ahead_is_predicted_from_what_is_done_also_where_a_job_waits_at_an_earlier_stage():
    times = StageTimes()
    done = job([])
    done.total_steps, done.resumed_from = 20, 10  # half of its steps were those of a checkpoint
    for stage, seconds in ((Stage.ENCODER, 1.0), (Stage.DENOISER, 5.0)):
        runs.assign(done.runs, stage, "any", 1, 10)
        runs.end(done.runs, 20, seconds=seconds)
    times.learn("m", done)
    request = Request("r", {}, Output(), 0.0, 9.0, [job(WAY[:1]), job(WAY[:4]), job(WAY[:5])], steps=40)
    families = list(head_metrics([("m", request)], ["m"], times, PromptCacheView(hits=3)))
    assert sample(families, "triptych_queued_seconds", model="m", stage="encoder") == 1.0
    assert sample(families, "triptych_queued_seconds", model="m", stage="denoiser") == 40.0
    assert sample(families, "triptych_queued_seconds", model="m", stage="decoder") == 0.0, "nothing is known of it yet"
    assert sample(families, "triptych_jobs", model="m", stage="denoiser", state="waiting") == 1
    assert sample(families, "triptych_jobs", model="m", stage="denoiser", state="running") == 1
    assert sample(families, "vllm:num_requests_running") == 1
    assert sample(families, "vllm:num_requests_waiting") == 2
    assert sample(families, "triptych_prompt_cache_hits_total") == 3


def test_an_instance_counts_for_each_stage_that_it_serves():
    views = [
        ("m", InstanceView("denoiser-0", "denoiser", 1, credits=1, slots=4, running=("r/0", "r/1", "s/0"))),
        ("m", InstanceView("denoiser-1", "denoiser", 1, credits=4, slots=4, running=(), awake=False)),
        ("n", InstanceView("n-monolithic-0", "monolithic", 1, credits=2, slots=2, running=())),
        ("n", InstanceView("n-decoder-0", "decoder", 1, credits=0, slots=1, running=())),  # it has a preview
    ]
    families = list(instance_metrics(["m", "n"], views))
    counted = [
        sample(families, "triptych_instances", model=model, stage=stage, state=state)
        for model in ("m", "n")
        for stage in Stage
        for state in ("awake", "asleep")
    ]
    assert counted == [0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 2, 0]
    assert sample(families, "triptych_slots", model="m", stage="denoiser", state="free") == 5
    assert sample(families, "triptych_slots", model="m", stage="denoiser", state="taken") == 3
    assert sample(families, "triptych_slots", model="n", stage="decoder", state="taken") == 1
