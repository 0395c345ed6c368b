"""The spans of a traced request that the head knows, made when it has ended. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby

from triptych.roles.head import runs
from triptych.roles.head.job import Job, Request, State
from triptych.roles.messages.common import Attempt
from triptych.roles.messages.requests import RunView
from triptych.roles.tracing import (
    AttributeValue,
    TraceContext,
    TraceSpan,
    attempt_name,
    context_of,
    new_span_id,
    span_id_of,
)


def request_spans(request: Request, model: str, kind_of: Callable[[str], str]) -> Iterator[TraceSpan]:
    """Yield the spans of a request that has ended: its own, those of its jobs, and of their waits and attempts.

    Args:
        request: No spans if it is not traced.
        model: Name of its model.
        kind_of: Returns the kind of an instance.
    """
    context = context_of(request.id)
    if context is None:
        return
    errors = [error for job in request.jobs if (error := _error(job))]
    facts: dict[str, AttributeValue] = {
        "triptych.request.id": request.id,
        "triptych.model": model,
        "triptych.outcome": request.state.value.lower(),
        "triptych.jobs": len(request.jobs),
        "triptych.steps": request.steps,
    }
    own = TraceContext(context.trace_id, span_id_of(request.id))
    error = errors[0] if errors else ""
    yield TraceSpan(own, "request", request.created_at, request.finished_at, context.span_id, facts, error)
    for job in request.jobs:
        yield from _job_spans(own, request, job, kind_of)


def _job_spans(parent: TraceContext, request: Request, job: Job, kind_of: Callable[[str], str]) -> Iterator[TraceSpan]:
    own = TraceContext(parent.trace_id, span_id_of(job.id))
    ended = job.history[-1].at if job.history else request.finished_at
    facts: dict[str, AttributeValue] = {
        "triptych.outcome": job.state.value.lower(),
        "triptych.index": job.index,
        "triptych.attempts": job.attempt,
    }
    yield TraceSpan(own, "job", request.created_at, ended, parent.span_id, facts, _error(job))
    free_since = 0.0
    # A monolithic instance has a run for each stage of one attempt.
    for (number, instance), parts in groupby(job.runs, key=lambda run: (run.attempt, run.instance)):
        whole = [*parts]
        first, last = whole[0], whole[-1]
        yield _wait(own, job, first, free_since)
        free_since = last.ended_at
        made = TraceContext(own.trace_id, span_id_of(attempt_name(Attempt(job.id, number), instance)))
        parked, cancelled = last.reason.endswith(runs.PARKED), job.state is State.CANCELLED and last is job.runs[-1]
        error = "" if parked or cancelled else last.reason
        facts = {"triptych.instance": instance, "triptych.attempt": number, "triptych.parked": parked}
        yield TraceSpan(made, kind_of(instance), first.assigned_at, last.ended_at, own.span_id, facts, error)


def _wait(parent: TraceContext, job: Job, run: RunView, free_since: float) -> TraceSpan:
    """Return the span from when a job had no instance, at the earliest from `free_since`, to a run."""
    began_at = runs.unassigned_since(job.history, run, free_since)
    made = TraceContext(parent.trace_id, new_span_id())
    return TraceSpan(made, "wait", began_at, run.assigned_at, parent.span_id, {"triptych.stage": run.stage})


def _error(job: Job) -> str:
    """Return why a job has ended without a result that it should have; "" if it has not."""
    unsuccessful = job.state in (State.FAILED, State.TIMED_OUT)
    return job.history[-1].reason or job.state.value if unsuccessful else ""
