"""Which blocks of a pool are held and for whom, and how much more may be stored. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Final

from triptych.engines.memory.buddy import block_bytes
from triptych.engines.stages import Stage
from triptych.roles.head.job import RUNNING, STAGE_OF, UPSTREAM, WAITING, Job, StoredOutput
from triptych.roles.head.prompt_cache import PromptCache
from triptych.roles.head.registry import InstanceRegistry
from triptych.roles.messages.common import LeaseRef, StoredPayload

LOOKAHEAD: Final = 2
"""Jobs that may be stored for a stage, as a multiple of the slots of its instances, before the stage upstream
waits: a bound on what waits in the pool rather than at the head."""
UNBOUNDED: Final = 1 << 30


class StoredOutputs:
    """Which blocks are held: by the jobs that start from them, and by the prompt cache.

    A job says itself which block it holds (`Job.stored`), and is changed here alone. A block is given back when nobody
    holds it any more: each method that lets go of blocks returns the leases to release.

    Args:
        jobs: The active ones, by id.
        cache: Of the model.
    """

    def __init__(self, jobs: Mapping[str, Job], cache: PromptCache | None = None) -> None:
        self.cache = PromptCache() if cache is None else cache
        self._jobs = jobs

    def holds(self, lease: LeaseRef) -> bool:
        """Whether a job or the cache needs the block."""
        return lease in self.cache or any(job.lease == lease for job in self._jobs.values())

    @property
    def leases(self) -> set[LeaseRef]:
        """Every block that a job or the cache needs."""
        return self._used | set(self.cache.leases)

    @property
    def _used(self) -> set[LeaseRef]:
        return {lease for job in self._jobs.values() if (lease := job.lease)}

    def put(self, job: Job, stage: Stage, payload: StoredPayload) -> tuple[LeaseRef, ...]:
        """Note that a job goes on from the output of a stage, in place of what that was made of."""
        freed = self.drop(job)
        job.stored = StoredOutput(stage, payload)
        return freed

    def drop(self, job: Job, *, spoilt: bool = False) -> tuple[LeaseRef, ...]:
        """Let a job start from nothing any more; what is spoilt, the cache forgets as well."""
        lease = job.lease
        if lease is None:
            return ()
        job.forget_stored()
        if spoilt:
            self.cache.drop((lease,))
        return () if self.holds(lease) else (lease,)

    def offer(self, key: bytes, seed: int, stored: StoredPayload, *, seed_independent: bool) -> tuple[LeaseRef, ...]:
        """Let the cache keep an encoder's output."""
        gone = self.cache.offer(key, seed, stored, seed_independent=seed_independent)
        return tuple(lease for lease in gone if not self.holds(lease))

    def evict(self, pool: str, nbytes: int) -> tuple[LeaseRef, ...]:
        """Take `nbytes` bytes from the cache, the least recently used first, what no job holds before the rest.

        The rest goes as well, and is given back when its last job lets go of it: were it kept, new jobs could hold
        it for ever.
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
        """Empty the cache."""
        leases = self.cache.leases
        self.cache.drop(leases)
        return tuple(lease for lease in leases if not self.holds(lease))

    def lose(self, pool: str, older_than: int) -> list[Job]:
        """Forget what lay in a pool's earlier generations; returns the jobs that held some of it."""

        def gone(lease: LeaseRef) -> bool:
            return lease.pool == pool and lease.pool_generation < older_than

        self.cache.drop([lease for lease in self.cache.leases if gone(lease)])
        losers = [job for job in self._jobs.values() if job.lease and gone(job.lease)]
        for job in losers:
            job.forget_stored()
        return losers


def downstream_capacity(stage: Stage, jobs: Collection[Job], registry: InstanceRegistry) -> int:
    """How many jobs more may be stored for the stage that comes after `stage`; may be negative."""
    after = next((p for p, upstream in UPSTREAM.items() if upstream is stage), None)
    if after is None:
        return UNBOUNDED
    # While no instance of it is there, those that are to come count: what is stored for them is bounded as well.
    slots = registry.slots(after) or registry.configured.get(after, 0)
    if not slots:
        return UNBOUNDED
    under_way = {WAITING[after], RUNNING[after], RUNNING[stage]}
    ahead = sum(u.state in under_way or (STAGE_OF.get(u.state) is stage and bool(u.instance)) for u in jobs)
    return (LOOKAHEAD + 1) * slots - ahead
