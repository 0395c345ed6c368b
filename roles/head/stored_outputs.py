"""What is stored: which blocks are held and for whom, and how much may still be stored. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Final

from triptych.engines.memory.buddy import block_bytes
from triptych.engines.stages import Stage
from triptych.roles.head.job import RUNNING, STAGE_OF, UPSTREAM, WAITING, Job
from triptych.roles.head.prompt_cache import PromptCache
from triptych.roles.head.registry import InstanceRegistry
from triptych.roles.messages.common import LeaseRef, StoredPayload

LOOKAHEAD: Final = 2
"""Units that may be stored for a stage, as a multiple of the slots of its instances, before the stage upstream
waits: a bound on what waits in the pool rather than at the head."""
UNBOUNDED: Final = 1 << 30


class StoredOutputs:
    """Blocks by who holds them: the jobs that start from them, and the prompt cache.

    A block is given back when nobody holds it any more: each method that lets go returns the leases of those.
    """

    def __init__(self, cache: PromptCache | None = None) -> None:
        self.cache = PromptCache() if cache is None else cache
        self._users: Counter[LeaseRef] = Counter()

    def adopt(self, job: Job) -> None:
        """Count what a job holds that comes out of the journal."""
        self._users.update(stored.lease for stored in job.stored.values())

    def holds(self, lease: LeaseRef) -> bool:
        """Whether anybody needs the block."""
        return lease in self._users or lease in self.cache

    @property
    def leases(self) -> set[LeaseRef]:
        """Every block that somebody needs."""
        return {*self._users, *self.cache.leases}

    def put(self, job: Job, stage: Stage, stored: StoredPayload) -> tuple[LeaseRef, ...]:
        """A stage's output is at rest, in place of what it was made of."""
        freed = self.drop(job)
        job.stored[stage] = stored
        self._users[stored.lease] += 1
        return freed

    def drop(self, job: Job, *, spoilt: bool = False) -> tuple[LeaseRef, ...]:
        """The job starts from nothing any more; what is spoilt nobody should start from."""
        leases = job.drop_stored()
        if spoilt:
            self.cache.drop(leases)
        return self._let_go(leases)

    def offer(self, key: bytes, seed: int, stored: StoredPayload, *, seed_independent: bool) -> tuple[LeaseRef, ...]:
        """Let the cache keep an encoder's output."""
        gone = self.cache.offer(key, seed, stored, seed_independent=seed_independent)
        return tuple(lease for lease in gone if not self.holds(lease))

    def evict(self, pool: str, nbytes: int) -> tuple[LeaseRef, ...]:
        """Take `nbytes` bytes from the cache, the least recently used first, what no job holds before the rest.

        The rest goes as well, and is given back when its last job lets go of it: were it kept, new jobs could hold
        it for ever.
        """
        here = (lease for lease in self.cache.leases if lease.pool == pool)
        gone: list[LeaseRef] = []
        for lease in sorted(here, key=lambda lease: lease in self._users):
            if sum(block_bytes(other.nbytes) for other in gone) >= nbytes:
                break
            gone.append(lease)
        self.cache.drop(gone)
        return tuple(lease for lease in gone if lease not in self._users)

    def clear(self) -> tuple[LeaseRef, ...]:
        """Empty the cache."""
        leases = self.cache.leases
        self.cache.drop(leases)
        return tuple(lease for lease in leases if not self.holds(lease))

    def lose(self, jobs: Iterable[Job], pool: str, older_than: int) -> list[Job]:
        """Forget what lay in a pool's earlier generations; returns the jobs that held some of it."""

        def gone(lease: LeaseRef) -> bool:
            return lease.pool == pool and lease.pool_generation < older_than

        self.cache.drop([lease for lease in self.cache.leases if gone(lease)])
        losers = []
        for job in jobs:
            if lost := [(stage, stored.lease) for stage, stored in job.stored.items() if gone(stored.lease)]:
                losers.append(job)
                job.forget_stored(stage for stage, _ in lost)
                self._let_go(lease for _, lease in lost)
        return losers

    def _let_go(self, leases: Iterable[LeaseRef]) -> tuple[LeaseRef, ...]:
        leases = tuple(leases)
        for lease in leases:
            self._users[lease] -= 1
            if not self._users[lease]:
                del self._users[lease]
        return tuple(lease for lease in leases if not self.holds(lease))


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
