from __future__ import annotations

import pytest

from triptych.engines.stages import Stage
from triptych.roles.head.head_metrics import StageTimes, head_metrics, recoveries, waits
from triptych.roles.head.job import Job, Request, State
from triptych.roles.messages.common import Output
from triptych.roles.messages.requests import PromptCacheView

WAY = [
    (State.ENCODER_WAITING, 0), (State.ENCODER_RUNNING, 2), (State.ENCODER_DONE, 3), (State.DENOISING_WAITING, 3),
    (State.DENOISING_RUNNING, 7), (State.DENOISING_WAITING, 10), (State.DENOISING_RUNNING, 10.5),
]  # fmt: skip


def job(moves: list[tuple[State, float]]) -> Job:
    made = Job("r/0", "r", 0, 0, state=State.PENDING)
    for state, at in moves:
        made.transition(state, at)
    return made


def test_waits_and_recoveries_are_read_off_the_moves():
    assert list(waits(job(WAY))) == [(Stage.ENCODER, 2), (Stage.DENOISER, 4), (Stage.DENOISER, 0.5)]
    assert list(recoveries(job(WAY))) == [(Stage.DENOISER, 0.5)]


def test_a_stage_whose_input_was_lost_recovers_when_it_runs_again():
    moves = [*WAY[:5], (State.ENCODER_WAITING, 8), (State.ENCODER_RUNNING, 9), *[(s, t + 7) for s, t in WAY[2:5]]]
    assert list(recoveries(job(moves))) == [(Stage.DENOISER, 6)]


@pytest.mark.parametrize("end", [State.FAILED, State.CANCELLED, State.TIMED_OUT])
def test_an_end_is_no_loss(end):
    assert list(recoveries(job([*WAY[:5], (end, 9)]))) == []


def sample(families, name: str, **labels: str) -> float:
    (found,) = [one.value for family in families for one in family.samples if one.name == name and one.labels == labels]
    return found


def test_the_work_that_waits_is_predicted_from_what_is_done():
    times = StageTimes()
    done = Job("d/0", "d", 0, 0, stage_seconds={"encoder": 0.5, "denoiser": 10.0}, total_steps=20)
    times.learn("m", done)
    request = Request("r", {}, Output(), 0.0, 9.0, [job(WAY[:1]), job(WAY[:4]), job(WAY[:5])], steps=40)
    families = list(head_metrics([("m", request)], ["m"], times, PromptCacheView(hits=3)))
    assert sample(families, "triptych_queued_seconds", model="m", stage="encoder") == 0.5
    assert sample(families, "triptych_queued_seconds", model="m", stage="denoiser") == 20.0
    assert sample(families, "triptych_jobs", model="m", stage="denoiser", state="waiting") == 1
    assert sample(families, "triptych_jobs", model="m", stage="denoiser", state="running") == 1
    assert sample(families, "vllm:num_requests_running") == 1
    assert sample(families, "vllm:num_requests_waiting") == 2
    assert sample(families, "triptych_prompt_cache_hits_total") == 3
