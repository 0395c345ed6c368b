"""Make the message that sends an attempt to its instance: what the stage reads, and what it is scheduled by. Pure."""

from __future__ import annotations

from triptych.engines.stages import Stage
from triptych.roles.head.job import UPSTREAM, Job, Request
from triptych.roles.head.scheduling_state import SchedulingState
from triptych.roles.messages.common import Attempt, LeaseRef, Provenance, Rebind, SchedulingHints, StoredPayload
from triptych.roles.messages.stages import StageAssign, TransferPush


class SupersededError(Exception):
    """The attempt is not current any more: its job was cancelled, or assigned to another instance."""


class SourceGoneError(Exception):
    """The stored outputs that an attempt needs were lost before it was sent."""

    def __init__(self) -> None:
        super().__init__("its stored tensors are gone")


def source_of(state: SchedulingState, attempt: Attempt, name: str) -> StoredPayload | None:
    """Return the stored outputs that an attempt needs; None for a first stage.

    Raises:
        SupersededError: The attempt is not assigned to the instance any more.
        SourceGoneError: The pool with the outputs has ended.
    """
    if preview := state.previews.find(attempt, name):
        return preview.payload
    job = state.jobs.find(attempt, name)
    if job is None:
        raise SupersededError
    if job.stage is None or job.stage is Stage.ENCODER:
        return None
    if job.stored is None or job.stored.stage is not UPSTREAM[job.stage]:
        raise SourceGoneError
    return job.stored.payload


def message_for(
    state: SchedulingState, attempt: Attempt, source: StoredPayload | None, target: LeaseRef | None, model: str = ""
) -> StageAssign | TransferPush:
    """Return the message that sends an attempt to its instance.

    Args:
        state: Of the model. What a denoise goes on from is recorded in its job.
        attempt: A current one; SupersededError is raised for any other.
        source: As `source_of` returned it.
        target: The block that the source is copied to; None if the instance maps the source.
        model: The name of the model for clients.
    """
    if (preview := state.previews.get(attempt)) and source:
        of = state.jobs[preview.job_id]
        request = state.requests[of.request_id]
        return TransferPush(attempt, source, target, request.output, of.left_s, accepted_at=request.created_at)
    job = state.jobs.get(attempt.job_id)
    if job is None or job.current_attempt != attempt:
        raise SupersededError
    request = state.requests[job.request_id]
    if source is None:
        hints, accepted_at = _hints(request, job), request.created_at
        return StageAssign(attempt, request.inputs, job.seed, request.output, job.left_s, hints, model, accepted_at)
    rebind = Rebind(request.inputs, job.seed) if job.uses_cached_prompt and job.stage is Stage.DENOISER else None
    previews = request.partial_images if job.stage is Stage.DENOISER else 0
    checkpoint = _checkpoint_for(state, job)
    hints = _hints(request, job)
    writes_file = job.stage is Stage.DECODER and request.output.metadata
    provenance = Provenance(model, request.inputs, job.seed) if writes_file else None
    return TransferPush(
        attempt,
        source,
        target,
        request.output,
        job.left_s,
        rebind,
        hints,
        previews,
        checkpoint,
        provenance,
        request.created_at,
    )


def _checkpoint_for(state: SchedulingState, job: Job) -> StoredPayload | None:
    """Return the checkpoint that a job's instance can go on from, in whichever pool it is."""
    if job.stage is not Stage.DENOISER:
        return None
    checkpoint = job.checkpoint
    job.resumed_from = checkpoint.step if checkpoint else 0
    job.steps_redone += max(0, job.steps_lost_at - job.resumed_from)
    job.steps_lost_at = job.resumed_from
    state.changed(job)
    return checkpoint.payload if checkpoint else None


def _hints(request: Request, job: Job) -> SchedulingHints:
    return SchedulingHints(
        priority=request.priority,
        due_s=request.deadline_left_s(job),
        steps=request.steps_left(job) or 0,
        bucket=max(1, job.bucket),
        owner=request.owner,
    )
