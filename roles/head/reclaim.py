"""Find the blocks of a pool that are not needed any more. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from triptych.roles.head.served_models import ServedModels
from triptych.roles.messages.common import Attempt, LeaseRef
from triptych.roles.messages.pool import LeaseView
from triptych.roles.previews import denoise_of


def unneeded(models: ServedModels, views: Iterable[LeaseView]) -> list[LeaseRef]:
    """Return the sealed blocks that no job, no preview and no prompt cache needs.

    A block that the current attempt of a job has sealed is needed, because its report may be on the way.
    """
    return [
        view.lease
        for view in views
        if view.state == "sealed" and not _held(models, view.lease) and _superseded(models, view.attempt)
    ]


def suspects(models: ServedModels, views: Iterable[LeaseView]) -> dict[str, list[LeaseView]]:
    """Return, by owner, the blocks being written for superseded attempts, which their owners may still have.

    Preallocated blocks have no job; the pool itself reclaims the blocks of an owner that has ended.
    """
    found: dict[str, list[LeaseView]] = {}
    for view in views:
        served = models.of(view.owner)
        lives = served and served.scheduler.registry.incarnation(view.owner, view.owner_generation)
        if view.state == "writing" and view.attempt.job_id and lives and _superseded(models, view.attempt):
            found.setdefault(view.owner, []).append(view)
    return found


def _held(models: ServedModels, lease: LeaseRef) -> bool:
    return any(
        scheduler.stored_outputs.needs(lease) or lease in scheduler.previews.leases for scheduler in models.schedulers
    )


def _superseded(models: ServedModels, attempt: Attempt) -> bool:
    attempt, _ = denoise_of(attempt)
    found = (scheduler.jobs.get(attempt.job_id) for scheduler in models.schedulers)
    job = next((job for job in found if job), None)
    return job is None or attempt.number < job.attempt
