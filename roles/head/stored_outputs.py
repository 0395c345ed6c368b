"""Track which blocks jobs and the prompt cache need, and how much more may be stored. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Final

from triptych.engines.memory.buddy import block_bytes
from triptych.engines.stages import Stage
from triptych.roles.head.active_jobs import ActiveJobs
from triptych.roles.head.job import UPSTREAM, Checkpoint, Job, StoredOutput
from triptych.roles.head.prompt_cache import PromptCache
from triptych.roles.head.registry import InstanceRegistry
from triptych.roles.messages.common import LeaseRef, StoredPayload

LOOKAHEAD: Final = 2
"""Jobs that may have stored outputs for a stage, as a multiple of the slots of its instances, before the stage upstream
waits. This bounds the jobs that wait in the pool."""
UNBOUNDED: Final = 1 << 30


class StoredOutputs:
    """The blocks that are needed by jobs, as the input of their next stage or to go on with it, and by the cache.

    `Job.stored` and `Job.checkpoint` are the blocks that a job needs; only this class changes them. A block is released
    when no job and no cache needs it any more: each method that frees blocks returns the leases to release.

    Args:
        jobs: The active jobs, by id.
        cache: The prompt cache of the model.
    """

    def __init__(self, jobs: Mapping[str, Job], cache: PromptCache | None = None) -> None:
        self.cache = PromptCache() if cache is None else cache
        self._jobs = jobs
        self._users: Counter[LeaseRef] = Counter()
        """How many jobs need a block."""

    def add(self, job: Job) -> None:
        """Count the blocks that a new active job needs."""
        self._users.update(job.leases)

    def needs(self, lease: LeaseRef) -> bool:
        """Return whether a job or the cache needs the block."""
        return lease in self._users or lease in self.cache

    def _unuse(self, lease: LeaseRef) -> None:
        self._users[lease] -= 1
        if not self._users[lease]:
            del self._users[lease]

    @property
    def leases(self) -> set[LeaseRef]:
        """Return every block that a job or the cache needs."""
        return self._used | set(self.cache.leases)

    @property
    def _used(self) -> set[LeaseRef]:
        return set(self._users)

    def put(self, job: Job, stage: Stage, payload: StoredPayload) -> tuple[LeaseRef, ...]:
        """Set the stored output of a job, in place of the previous one; return the leases to release."""
        # What is encoded again is the same, so that the denoise can still go on.
        freed = self._drop_output(job) if stage is Stage.ENCODER else self.drop(job)
        job.stored = StoredOutput(stage, payload)
        self._users[payload.lease] += 1
        return freed

    def drop(self, job: Job) -> tuple[LeaseRef, ...]:
        """Remove all that is stored for a job; return the leases to release."""
        return (*self.drop_checkpoint(job), *self._drop_output(job))

    def drop_spoilt(self, job: Job) -> tuple[LeaseRef, ...]:
        """Remove the stored output of a job, from the cache too, but no checkpoint; return the leases to release."""
        if job.lease:
            self.cache.drop((job.lease,))
        return self._drop_output(job)

    def _drop_output(self, job: Job) -> tuple[LeaseRef, ...]:
        lease = job.lease
        job.forget_stored()
        if lease is None:
            return ()
        self._unuse(lease)
        return () if self.needs(lease) else (lease,)

    def put_checkpoint(self, job: Job, step: int, payload: StoredPayload) -> tuple[LeaseRef, ...]:
        """Set the checkpoint of a job, in place of the previous one; return the leases to release."""
        freed = self.drop_checkpoint(job)
        job.checkpoint = Checkpoint(step, payload)
        self._users[payload.lease] += 1
        return freed

    def drop_checkpoint(self, job: Job) -> tuple[LeaseRef, ...]:
        """Remove the checkpoint of a job, which then begins its denoise again; return the leases to release."""
        checkpoint, job.checkpoint = job.checkpoint, None
        if checkpoint is None:
            return ()
        self._unuse(checkpoint.payload.lease)
        return (checkpoint.payload.lease,)

    def evict_checkpoints(self, pool: str, nbytes: int) -> tuple[LeaseRef, ...]:
        """Remove checkpoints of `nbytes` bytes, those of running jobs first; return the leases to release."""
        holders = [job for job in self._jobs.values() if job.checkpoint and job.checkpoint.payload.lease.pool == pool]
        gone: list[LeaseRef] = []
        for job in sorted(holders, key=lambda job: not job.instance):
            if sum(block_bytes(other.nbytes) for other in gone) >= nbytes:
                break
            gone += self.drop_checkpoint(job)
        return tuple(gone)

    def offer(self, key: bytes, seed: int, stored: StoredPayload, *, seed_independent: bool) -> tuple[LeaseRef, ...]:
        """Offer an encoder's output to the cache; return the leases to release."""
        gone = self.cache.offer(key, seed, stored, seed_independent=seed_independent)
        return tuple(lease for lease in gone if not self.needs(lease))

    def evict(self, pool: str, nbytes: int) -> tuple[LeaseRef, ...]:
        """Evict `nbytes` bytes from the cache, the least recently used first, but blocks that jobs need last.

        Blocks that jobs need are evicted too, and released with the last of these jobs: otherwise new jobs could use
        them for ever.
        """
        used = self._used
        here = (lease for lease in self.cache.leases if lease.pool == pool)
        gone: list[LeaseRef] = []
        for lease in sorted(here, key=lambda lease: lease in used):
            if sum(block_bytes(other.nbytes) for other in gone) >= nbytes:
                break
            gone.append(lease)
        self.cache.drop(gone)
        return tuple(lease for lease in gone if lease not in used)

    def clear(self) -> tuple[LeaseRef, ...]:
        """Empty the cache; return the leases to release."""
        leases = self.cache.leases
        self.cache.drop(leases)
        return tuple(lease for lease in leases if not self.needs(lease))

    def lose(self, pool: str, older_than: int) -> list[Job]:
        """Forget blocks of a pool's earlier generations; return the jobs that needed one to go on at all."""

        def gone(lease: LeaseRef) -> bool:
            return lease.pool == pool and lease.pool_generation < older_than

        self.cache.drop([lease for lease in self.cache.leases if gone(lease)])
        for job in self._jobs.values():
            if job.checkpoint and gone(job.checkpoint.payload.lease):
                self.drop_checkpoint(job)
        losers = [job for job in self._jobs.values() if job.lease and gone(job.lease)]
        for job in losers:
            self._drop_output(job)
        return losers


def downstream_capacity(stage: Stage, jobs: ActiveJobs, registry: InstanceRegistry) -> int:
    """Return how many more jobs may be stored for the stage after `stage`; may be negative."""
    after = next((p for p, upstream in UPSTREAM.items() if upstream is stage), None)
    if after is None:
        return UNBOUNDED
    # Without an instance of that stage, count the configured ones, so that the bound holds for them too.
    slots = registry.slots(after) or registry.configured.get(after, 0)
    if not slots:
        return UNBOUNDED
    # Few decoders keep up with many denoises in turns or batches, and must not leave slots of denoisers empty.
    ahead_of_slots = max(slots, registry.slots(stage)) if stage is Stage.DENOISER else slots
    return LOOKAHEAD * slots + ahead_of_slots - jobs.under_way(stage, after)
