"""What is staged: which slots are held and for whom, and how much may still be staged. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Final

from triptych.engines.panels import Panel
from triptych.roles.fleet import Fleet
from triptych.roles.messages.work import LeaseRef, Staged
from triptych.roles.prompt_cache import PromptCache, block
from triptych.roles.request import PANEL_OF, RUNNING, UPSTREAM, WAITING, Unit

AHEAD: Final = 2
"""Units that may be staged for a panel, as a multiple of the slots of its instances, before the panel upstream
waits: a bound on what waits in the pool rather than at the head."""
NO_BOUND: Final = 1 << 30


class Staging:
    """Slots by who holds them: the units that start from them, and the prompt cache.

    A slot is given back when nobody holds it any more: each method that lets go returns the leases of those.
    """

    def __init__(self, cache: PromptCache | None = None) -> None:
        self.cache = PromptCache() if cache is None else cache
        self._users: Counter[LeaseRef] = Counter()

    def adopt(self, unit: Unit) -> None:
        """Count what a unit holds that comes out of the journal."""
        self._users.update(staged.lease for staged in unit.staged.values())

    def holds(self, lease: LeaseRef) -> bool:
        """Whether anybody needs the slot."""
        return lease in self._users or lease in self.cache

    @property
    def leases(self) -> set[LeaseRef]:
        """Every slot that somebody needs."""
        return {*self._users, *self.cache.leases}

    def put(self, unit: Unit, panel: Panel, staged: Staged) -> tuple[LeaseRef, ...]:
        """A panel's output is at rest, in place of what it was made of."""
        freed = self.drop(unit)
        unit.staged[panel] = staged
        self._users[staged.lease] += 1
        return freed

    def drop(self, unit: Unit, *, spoilt: bool = False) -> tuple[LeaseRef, ...]:
        """The unit starts from nothing any more; what is spoilt nobody should start from."""
        leases = unit.drop_staged()
        if spoilt:
            self.cache.drop(leases)
        return self._let_go(leases)

    def offer(self, key: bytes, seed: int, staged: Staged, *, seedless: bool) -> tuple[LeaseRef, ...]:
        """Let the cache keep an encoder's output."""
        gone = self.cache.offer(key, seed, staged, seedless=seedless)
        return tuple(lease for lease in gone if not self.holds(lease))

    def make_room(self, pool: str, nbytes: int) -> tuple[LeaseRef, ...]:
        """Take `nbytes` bytes from the cache, the least recently used first, what no unit holds before the rest.

        The rest goes as well, and is given back when its last unit lets go of it: were it kept, new units could hold
        it for ever.
        """
        here = (lease for lease in self.cache.leases if lease.pool == pool)
        gone: list[LeaseRef] = []
        for lease in sorted(here, key=lambda lease: lease in self._users):
            if sum(block(other.nbytes) for other in gone) >= nbytes:
                break
            gone.append(lease)
        self.cache.drop(gone)
        return tuple(lease for lease in gone if lease not in self._users)

    def clear(self) -> tuple[LeaseRef, ...]:
        """Empty the cache."""
        leases = self.cache.leases
        self.cache.drop(leases)
        return tuple(lease for lease in leases if not self.holds(lease))

    def lose(self, units: Iterable[Unit], pool: str, older_than: int) -> list[Unit]:
        """Forget what lay in a pool's earlier generations; returns the units that held some of it."""

        def gone(lease: LeaseRef) -> bool:
            return lease.pool == pool and lease.pool_generation < older_than

        self.cache.drop([lease for lease in self.cache.leases if gone(lease)])
        losers = []
        for unit in units:
            if lost := [(panel, staged.lease) for panel, staged in unit.staged.items() if gone(staged.lease)]:
                losers.append(unit)
                unit.forget_staged(panel for panel, _ in lost)
                self._let_go(lease for _, lease in lost)
        return losers

    def _let_go(self, leases: Iterable[LeaseRef]) -> tuple[LeaseRef, ...]:
        leases = tuple(leases)
        for lease in leases:
            self._users[lease] -= 1
            if not self._users[lease]:
                del self._users[lease]
        return tuple(lease for lease in leases if not self.holds(lease))


def room_ahead(panel: Panel, units: Collection[Unit], fleet: Fleet) -> int:
    """How many units more may be staged for the panel that comes after `panel`; may be negative."""
    after = next((p for p, upstream in UPSTREAM.items() if upstream is panel), None)
    if after is None:
        return NO_BOUND
    # While no instance of it is there, those that are to come count: what is staged for them is bounded as well.
    slots = fleet.slots(after) or fleet.configured.get(after, 0)
    if not slots:
        return NO_BOUND
    under_way = {WAITING[after], RUNNING[after], RUNNING[panel]}
    ahead = sum(u.state in under_way or (PANEL_OF.get(u.state) is panel and bool(u.instance)) for u in units)
    return (AHEAD + 1) * slots - ahead
