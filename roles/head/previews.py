"""Decide what becomes of the previews that denoisers have stored. Pure.

A preview is decoded when a decoder has nothing else to do, and is dropped for any reason: it is never retried, and
never delays or fails the job that it is of.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass

from triptych.roles.head.job import Job
from triptych.roles.messages.common import Attempt, LeaseRef, StoredPayload
from triptych.roles.previews import denoise_of


@dataclass(slots=True)
class Preview:
    """One preview that is not an image yet."""

    attempt: Attempt
    """Its own, of `roles.previews.preview_attempt`."""
    payload: StoredPayload
    instance: str = ""
    """The decoder that it is assigned to, "" while it waits."""

    @property
    def job_id(self) -> str:
        """Return the id of the job that it is of."""
        return denoise_of(self.attempt)[0].job_id

    @property
    def step(self) -> int:
        """Return the step after which it was stored."""
        return denoise_of(self.attempt)[1]


class Previews:
    """The previews that wait for a decoder, or are at one, oldest first.

    Args:
        load_changed: Called with the name of an instance that was given a preview, or has lost one.
    """

    def __init__(self, load_changed: Callable[[str], None]) -> None:
        self._load_changed = load_changed
        self._by_id: dict[str, Preview] = {}
        self._waiting: dict[str, Preview] = {}
        self._by_job: dict[str, dict[str, Preview]] = {}
        self._by_instance: dict[str, dict[str, Preview]] = {}
        self._leases: set[LeaseRef] = set()

    def __len__(self) -> int:
        return len(self._by_id)

    def add(self, job: Job, wanted: int, attempt: Attempt, payload: StoredPayload) -> bool:
        """Keep a stored preview of a running denoise; return False if it is not wanted, so that its block is released.

        Args:
            job: The job.
            wanted: How many its request asked for.
            attempt: Of the preview.
            payload: What its denoiser has stored.
        """
        steps = {view.step for view in job.previews} | {preview.step for preview in self.of_job(job.id)}
        if denoise_of(attempt)[1] in {0, *steps} or len(steps) >= wanted:
            return False  # no preview, or one that an earlier attempt has made
        preview = Preview(attempt, payload)
        self._by_id[attempt.job_id] = self._waiting[attempt.job_id] = preview
        self._by_job.setdefault(job.id, {})[attempt.job_id] = preview
        self._leases.add(payload.lease)
        return True

    def waiting(self) -> tuple[Preview, ...]:
        """Return those that no decoder has, oldest first."""
        return tuple(self._waiting.values())

    def assign(self, preview: Preview, instance: str) -> None:
        """Give a waiting preview to a decoder."""
        preview.instance = instance
        del self._waiting[preview.attempt.job_id]
        self._by_instance.setdefault(instance, {})[preview.attempt.job_id] = preview
        self._load_changed(instance)

    def find(self, attempt: Attempt, instance: str) -> Preview | None:
        """Return the preview of that attempt if it is assigned to the instance."""
        preview = self._by_id.get(attempt.job_id)
        return preview if preview and (preview.attempt, preview.instance) == (attempt, instance) else None

    def get(self, attempt: Attempt) -> Preview | None:
        """Return the preview of that attempt, assigned or not."""
        preview = self._by_id.get(attempt.job_id)
        return preview if preview and preview.attempt == attempt else None

    def load(self, instance: str) -> int:
        """Return how many an instance has."""
        return len(self._by_instance.get(instance, ()))

    def of_job(self, job_id: str) -> tuple[Preview, ...]:
        """Return those of a job."""
        return tuple(self._by_job.get(job_id, {}).values())

    def on(self, instance: str) -> tuple[Preview, ...]:
        """Return those that an instance has."""
        return tuple(self._by_instance.get(instance, {}).values())

    def stored_in(self, pool: str) -> tuple[Preview, ...]:
        """Return those that a pool has."""
        return tuple(preview for preview in self._by_id.values() if preview.payload.lease.pool == pool)

    @property
    def leases(self) -> Set[LeaseRef]:
        """Return the blocks that previews need."""
        return self._leases

    def remove(self, preview: Preview) -> LeaseRef:
        """Forget a preview; return the lease to release."""
        id_, job_id = preview.attempt.job_id, preview.job_id
        del self._by_id[id_], self._by_job[job_id][id_]
        if not self._by_job[job_id]:
            del self._by_job[job_id]
        self._waiting.pop(id_, None)
        if preview.instance:
            del self._by_instance[preview.instance][id_]
            self._load_changed(preview.instance)
        self._leases.discard(preview.payload.lease)
        return preview.payload.lease
