"""Watch the instances, the pools, and the blocks that the pools hold."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

from triptych.actors import Actor
from triptych.backoff import backoff_s
from triptych.bus import AskTimeoutError, BusError, UnreachableError
from triptych.roles.head.effect_runner import EffectRunner
from triptych.roles.head.reclaim import suspects, unneeded
from triptych.roles.head.served_models import ServedModels
from triptych.roles.messages import pool as pools
from triptych.roles.messages import stages
from triptych.roles.messages.common import LeaseRef
from triptych.roles.messages.stages import INSTANCE_ANSWER_S

ASK_AGAIN_S: Final = 0.2
"""How long a pool whose connection was lost may take to answer before what it has is made again."""


class Monitor:
    """Tells the schedulers when a process has ended, and releases blocks that no job needs.

    Args:
        actor: Runs the tasks.
        models: Their schedulers are told.
        pool_names: The pools of the topology.
        effect_runner: Releases blocks.
        on_outcome: Called after a scheduler was told, so that its decisions take effect.
    """

    def __init__(
        self,
        actor: Actor,
        models: ServedModels,
        pool_names: Iterable[str],
        effect_runner: EffectRunner,
        on_outcome: Callable[[], None],
    ) -> None:
        self._actor = actor
        self._models = models
        self._pool_names = tuple(pool_names)
        self._effect_runner = effect_runner
        self._on_outcome = on_outcome
        self._pools: dict[str, int] = {}
        """Generation of each pool that has answered."""

    # -- instances

    def watch_instance(self, name: str, generation: int) -> None:
        """Tell the scheduler when the process of an instance has ended."""
        self._actor.spawn(self._watch_instance(name, generation), name=f"watch {name}")

    async def _watch_instance(self, name: str, generation: int) -> None:
        await self._actor.reference(name).down()
        if self._models.scheduler_of(name).connection_lost(name, generation, time.time()):
            self._actor.log.warning("instance down", instance=name)
        self._on_outcome()

    # -- pools

    def watch_pools(self) -> None:
        """Watch every pool of the topology."""
        for name in self._pool_names:
            self._actor.spawn(self._watch_pool(name), name=f"watch {name}")

    def pools_missing(self) -> list[str]:
        """Return the names of the pools that have not answered."""
        return [name for name in self._pool_names if name not in self._pools]

    async def _watch_pool(self, name: str) -> None:
        """Tell the schedulers each time that a pool, with all its stored tensors, has ended; never returns."""
        reference = self._actor.reference(name)
        tries = 0
        while True:
            # Watch before asking, so that the end of the pool right after its answer is not missed.
            lost = self._actor.spawn(reference.down(), name=f"down {name}")
            try:
                found = await reference.ask(pools.PoolQuery(), pools.PoolDescription, timeout_s=pools.POOL_ANSWER_S)
            except BusError as error:  # it has not started, or is not open
                lost.cancel()
                self._actor.log.info("pool does not answer", pool=name, error=str(error))
                await asyncio.sleep(backoff_s(tries))
                tries += 1
                continue
            tries = 0
            self._pools[name] = found.generation
            for scheduler in self._models.schedulers:
                scheduler.registry.set_pool_away(name, away=False)
            self._forget_older(name, found.generation)
            await lost
            del self._pools[name]
            for scheduler in self._models.schedulers:
                scheduler.registry.set_pool_away(name, away=True)
            if await self._is_still_there(name, found.generation):
                self._actor.log.info("connection to a pool was lost", pool=name)
                continue
            self._actor.log.warning("pool down", pool=name)
            self._forget_older(name, found.generation + 1)

    async def _is_still_there(self, name: str, generation: int) -> bool:
        """Ask a pool again whose connection was lost, before its tensors are forgotten; only the connection may be."""
        try:
            async with asyncio.timeout(ASK_AGAIN_S):
                while True:
                    try:
                        found = await self._actor.reference(name).ask(
                            pools.PoolQuery(), pools.PoolDescription, timeout_s=ASK_AGAIN_S / 4
                        )
                    except UnreachableError:
                        await asyncio.sleep(ASK_AGAIN_S / 10)
                    except AskTimeoutError:  # it may have reached the mailbox of the pool that has just ended
                        continue
                    else:
                        return found.generation == generation
        except (TimeoutError, BusError):  # as if it had ended: what it has is made again
            return False

    def _forget_older(self, pool: str, generation: int) -> None:
        for scheduler in self._models.schedulers:
            scheduler.pool_down(pool, generation, time.time())
        self._on_outcome()

    # -- blocks

    async def reclaim(self) -> None:
        """Release blocks that no job needs: of superseded attempts, or of attempts that no instance has."""
        for pool in tuple(self._pools):  # a copy, since a pool that ends is removed meanwhile
            try:
                await self._reclaim_from(pool)
            except BusError as error:
                self._actor.log.info("reclaim postponed", pool=pool, error=str(error))

    async def _reclaim_from(self, pool: str) -> None:
        """Release the blocks of one pool, page by page. Raises BusError."""
        query: pools.LeaseQuery | None = pools.LeaseQuery()
        while query:
            report = await self._actor.reference(pool).ask(query, pools.LeaseReport, timeout_s=pools.POOL_ANSWER_S)
            query = pools.LeaseQuery(report.leases[-1].lease.lease_id) if report.more else None
            leases = (*unneeded(self._models, report.leases), *await self._unclaimed(report.leases))
            if leases:
                self._actor.log.info("reclaimed", pool=pool, blocks=len(leases))
                await self._effect_runner.release(leases)

    async def _unclaimed(self, views: Iterable[pools.LeaseView]) -> list[LeaseRef]:
        """Ask the owners of blocks being written, and return the blocks that they do not know."""
        unclaimed: list[LeaseRef] = []
        for owner, asked_about in suspects(self._models, views).items():
            query = stages.AttemptQuery(tuple(view.attempt for view in asked_about))
            try:
                claimed = await self._actor.reference(owner).ask(
                    query, stages.AttemptsAssigned, timeout_s=INSTANCE_ANSWER_S
                )
            except BusError as error:
                self._actor.log.info("reclaim postponed", owner=owner, error=str(error))
                continue
            unclaimed += [view.lease for view in asked_about if view.attempt not in claimed.attempts]
        return unclaimed
