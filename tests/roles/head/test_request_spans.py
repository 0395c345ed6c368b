"""The head's spans of a traced request, over a denoiser that dies."""

from __future__ import annotations

from triptych.engines.stages import Stage
from triptych.roles.head import runs
from triptych.roles.head.job import RUNNING, WAITING, Job, Request, State
from triptych.roles.head.request_spans import request_spans
from triptych.roles.messages.common import Attempt, Output
from triptych.roles.tracing import TraceSpan, attempt_name, span_id_of

REQUEST = f"req_{'a' * 32}-{'b' * 16}"
DIED = "denoiser-0: its process ended"


def kind_of(instance: str) -> str:
    return instance.rpartition("-")[0]


def run(job: Job, stage: Stage, instance: str, begin: float, end: float, reason: str = "") -> None:
    """A stage that waits for a second, is assigned for another, and then runs."""
    if job.state is not WAITING[stage]:
        job.advance(WAITING[stage], begin)
    runs.assign(job.runs, stage, instance, job.attempt, begin + 1)
    job.advance(RUNNING[stage], begin + 2)
    runs.start(job.runs, stage, begin + 2, 0)
    runs.end(job.runs, end, reason=reason)
    if reason:
        job.transition(WAITING[stage], end, reason)
        job.attempt += 1


def ended(job: Job, state: State, at: float, reason: str = "") -> list[TraceSpan]:
    job.transition(state, at, reason)
    request = Request(job.request_id, {}, Output(), 100.0, 700.0, [job], steps=4, finished_at=at)
    return list(request_spans(request, "m", kind_of))


def lost_once(request_id: str) -> list[TraceSpan]:
    job = Job(f"{request_id}/0", request_id, 0, 0, attempt=1)
    run(job, Stage.ENCODER, "encoder-0", 100, 110)
    run(job, Stage.DENOISER, "denoiser-0", 110, 120, DIED)
    run(job, Stage.DENOISER, "denoiser-1", 120, 130)
    run(job, Stage.DECODER, "decoder-0", 130, 140)
    return ended(job, State.DONE, 140)


def test_attempts_lie_in_their_job_and_that_in_the_request_also_one_that_was_lost() -> None:
    spans, request, job = lost_once(REQUEST), span_id_of(REQUEST), span_id_of(f"{REQUEST}/0")
    assert [(span.name, span.began, span.ended, span.parent_id) for span in spans] == [
        ("request", 100, 140, "b" * 16),
        ("job", 100, 140, request),
        ("wait", 100, 101, job),
        ("encoder", 101, 110, job),
        ("wait", 110, 111, job),
        ("denoiser", 111, 120, job),
        ("wait", 120, 121, job),
        ("denoiser", 121, 130, job),
        ("wait", 130, 131, job),
        ("decoder", 131, 140, job),
    ]
    attempts = [span for span in spans if span.name in tuple(Stage)]
    assert [span.error for span in attempts] == ["", DIED, "", ""]
    assert [span.context.span_id for span in attempts] == [
        span_id_of(attempt_name(Attempt(f"{REQUEST}/0", number), name))
        for number, name in [(1, "encoder-0"), (1, "denoiser-0"), (2, "denoiser-1"), (2, "decoder-0")]
    ]
    assert {span.context.trace_id for span in spans} == {"a" * 32}
    assert spans[0].attributes["triptych.outcome"] == "done"
    assert spans[0].error == ""


def test_a_request_that_is_not_traced_has_no_spans() -> None:
    assert lost_once("req_1") == []


def test_a_monolithic_instance_has_one_attempt_for_all_stages() -> None:
    job = Job(f"{REQUEST}/0", REQUEST, 0, 0, attempt=1)
    job.advance(State.ENCODER_WAITING, 100)
    runs.assign(job.runs, Stage.ENCODER, "monolithic-0", 1, 101)
    for at, stage in enumerate(Stage, start=102):
        job.advance(RUNNING[stage], at)
        runs.start(job.runs, stage, at, 0)
    runs.end(job.runs, 110, seconds=5)
    spans = ended(job, State.DONE, 110)
    assert [(span.name, span.began, span.ended) for span in spans[2:]] == [("wait", 100, 101), ("monolithic", 101, 110)]


def test_what_was_parked_or_cancelled_has_not_failed_and_what_timed_out_has() -> None:
    def parked() -> Job:
        job = Job(f"{REQUEST}/0", REQUEST, 0, 0, attempt=1)
        run(job, Stage.ENCODER, "encoder-0", 100, 110, f"encoder-0: {runs.PARKED}")
        runs.assign(job.runs, Stage.ENCODER, "encoder-1", 2, 111)
        runs.end(job.runs, 120, reason="so it was")
        return job

    timed_out = ended(parked(), State.TIMED_OUT, 120, "so it was")
    assert [(span.name, span.error) for span in timed_out] == [
        ("request", "so it was"), ("job", "so it was"), ("wait", ""), ("encoder", ""), ("wait", ""),
        ("encoder", "so it was"),
    ]  # fmt: skip
    assert [span.attributes["triptych.parked"] for span in timed_out if span.name == "encoder"] == [True, False]
    assert {span.error for span in ended(parked(), State.CANCELLED, 120, "so it was")} == {""}
