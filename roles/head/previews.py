"""Decide what becomes of the previews that denoisers have stored. Pure.

A preview is decoded when a decoder has nothing else to do, and is dropped for any reason: it is never retried, and
never delays or fails the job that it is of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
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
    """The previews that wait for a decoder, or are at one, oldest first."""

    def __init__(self) -> None:
        self._by_id: dict[str, Preview] = {}

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
        steps = {preview.step for preview in job.previews}
        steps |= {preview.step for preview in self._by_id.values() if preview.job_id == job.id}
        if denoise_of(attempt)[1] in {0, *steps} or len(steps) >= wanted:
            return False  # no preview, or one that an earlier attempt has made
        self._by_id[attempt.job_id] = Preview(attempt, payload)
        return True

    def waiting(self) -> list[Preview]:
        """Return those that no decoder has, oldest first."""
        return [preview for preview in self._by_id.values() if not preview.instance]

    def find(self, attempt: Attempt, instance: str) -> Preview | None:
        """Return the preview of that attempt if it is assigned to the instance."""
        preview = self._by_id.get(attempt.job_id)
        return preview if preview and (preview.attempt, preview.instance) == (attempt, instance) else None

    def get(self, attempt: Attempt) -> Preview | None:
        """Return the preview of that attempt, assigned or not."""
        preview = self._by_id.get(attempt.job_id)
        return preview if preview and preview.attempt == attempt else None

    def load(self) -> Counter[str]:
        """Return how many each instance has, by name."""
        return Counter(preview.instance for preview in self._by_id.values() if preview.instance)

    @property
    def leases(self) -> set[LeaseRef]:
        """Return the blocks that previews need."""
        return {preview.payload.lease for preview in self._by_id.values()}

    def remove(self, attempt: Attempt) -> tuple[LeaseRef, ...]:
        """Forget a preview; return the lease to release."""
        if self.get(attempt) is None:
            return ()
        return (self._by_id.pop(attempt.job_id).payload.lease,)

    def remove_if(self, doomed: Callable[[Preview], bool]) -> list[Preview]:
        """Forget some previews and return them: their leases are to be released, and their decoders told."""
        gone = [preview for preview in self._by_id.values() if doomed(preview)]
        for preview in gone:
            del self._by_id[preview.attempt.job_id]
        return gone
