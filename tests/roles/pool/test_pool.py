from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

import msgspec
import pytest

from tests.roles.factories import make_scheduler, single_model
from triptych.actors import Actor, StartDelayedError
from triptych.bus import RefusedError, RemoteError
from triptych.engines.codec.checksum import checksum
from triptych.roles.head.effect_runner import EffectRunner
from triptych.roles.head.monitor import Monitor
from triptych.roles.messages.common import Attempt, LeaseRef
from triptych.roles.messages.pool import (
    BlockLeased,
    BlockPulled,
    BlockSealed,
    BlocksReleased,
    LeaseBlock,
    LeaseQuery,
    LeaseReport,
    MemoryPressure,
    PoolDescription,
    PoolFull,
    PoolQuery,
    PullBlock,
    ReleaseBlocks,
    ReleasePreallocated,
    SealBlock,
)
from triptych.roles.pool import pool as pool_module
from triptych.roles.pool.pool import BufferPool, build, zones

W = Attempt("r/0", 1)
BLOCK = 1 << 16
CAPACITY = 4 << 20
PATIENCE_S = 30.0


class Role(Actor):
    """An owner of blocks, at the address of a role instance."""


class FakeHead(Actor):
    """Hears what pools want."""

    def __init__(self) -> None:
        super().__init__("head")
        self.told: asyncio.Queue[MemoryPressure] = asyncio.Queue()

    async def evict(self, message: MemoryPressure) -> None:
        self.told.put_nowait(message)


class Client(Actor):
    """Asks pools on behalf of a test."""

    def __init__(self) -> None:
        super().__init__("test")

    async def lease(self, pool: str = "pool", **changes: Any) -> LeaseRef:
        fields: dict[str, Any] = {
            "attempt": W, "owner": "encoder-0", "owner_generation": 1, "nbytes": BLOCK, **changes,
        }  # fmt: skip
        answer = await self.reference(pool).ask(LeaseBlock(**fields), BlockLeased, PoolFull, timeout_s=5)
        assert isinstance(answer, BlockLeased), answer
        return answer.lease

    async def seal(self, lease: LeaseRef, value: int = 7) -> None:
        await self.reference(lease.pool).ask(SealBlock(lease, value, lease.nbytes), BlockSealed, timeout_s=5)

    async def release(self, *leases: LeaseRef) -> int:
        answer = await self.reference(leases[0].pool).ask(ReleaseBlocks(leases), BlocksReleased, timeout_s=5)
        return answer.count

    async def report(self, pool: str = "pool") -> LeaseReport:
        return await self.reference(pool).ask(LeaseQuery(), LeaseReport, timeout_s=5)

    async def describe(self, pool: str = "pool") -> PoolDescription:
        found = await self.reference(pool).ask(PoolQuery(), PoolDescription, timeout_s=5)
        assert found.free + found.leased == found.capacity
        return found

    async def pull(
        self, source: LeaseRef, target: LeaseRef, nbytes: int = BLOCK, timeout_s: float = 5, attempt: Attempt = W
    ) -> BlockPulled:
        message = PullBlock(source, target, nbytes, timeout_s, attempt)
        return await self.reference(target.pool).ask(message, BlockPulled, timeout_s=timeout_s + 10)

    async def until(self, condition: Any, pool: str = "pool") -> LeaseReport:
        """Ask until the report fits; the test's own time limit ends it otherwise."""
        while True:
            report = await self.report(pool)
            if condition(report):
                return report


def test_a_block_is_leased_sealed_and_released(run: Any, make_topology: Any, local_cluster: Any) -> None:
    async def body() -> None:
        async with local_cluster(make_topology()) as h:
            await h.component("pool", build, generation=9)
            await h.start(client := Client())
            before = await client.describe()
            assert (before.capacity, before.leased, before.generation) == (CAPACITY, 0, 9)
            lease = await client.lease()
            assert (lease.pool, lease.pool_generation, lease.nbytes) == ("pool", 9, BLOCK)
            assert (await client.describe()).leased == BLOCK
            await client.seal(lease)
            await client.seal(lease)
            view = (await client.report()).leases[0]
            assert (view.lease, view.state, view.owner, view.attempt) == (lease, "sealed", "encoder-0", W)
            assert await client.release(lease) == 1
            assert await client.release(lease) == 0
            assert (await client.describe()).free == CAPACITY

    run(body())


def test_asking_again_before_the_seal_gives_the_same_block(run: Any, make_topology: Any, local_cluster: Any) -> None:
    async def body() -> None:
        async with local_cluster(make_topology()) as h:
            await h.component("pool", build)
            await h.start(client := Client())
            first = await client.lease()
            assert await client.lease() == first
            assert await client.lease(attempt=Attempt("r/0", 2)) != first
            assert await client.lease(incoming=True) != first
            await client.seal(first)
            assert await client.lease() != first

    run(body())


def test_a_full_pool_says_whether_it_will_ever_do(run: Any, make_topology: Any, local_cluster: Any) -> None:
    async def body() -> None:
        async with local_cluster(make_topology()) as h:
            await h.component("pool", build)
            await h.start(client := Client())
            await h.start(head := FakeHead())

            async def full(**changes: Any) -> PoolFull:
                fields = {"attempt": W, "owner": "denoiser-0", "owner_generation": 1, **changes}
                return await client.reference("pool").ask(LeaseBlock(**fields), PoolFull, timeout_s=5)

            half = CAPACITY // 2
            for owner in ("encoder-0", "denoiser-0"):
                never = await full(nbytes=half + 1, owner=owner)
                assert (never.needed, never.largest) == (half + 1, half)
            leases = [await client.lease(owner=owner, nbytes=half) for owner in ("encoder-0", "denoiser-0")]
            for owner in ("denoiser-0", "encoder-0"):
                not_now = await full(nbytes=BLOCK, attempt=Attempt("r/1", 1), owner=owner)
                assert (not_now.free, not_now.needed, not_now.largest) == (0, BLOCK, half)
            told = await asyncio.wait_for(head.told.get(), 10)
            assert told == MemoryPressure("pool", BLOCK), (
                "and nothing of what can never fit, nor of what is no encoder's"
            )
            assert head.told.empty()
            await client.release(*leases)
            assert (await client.describe()).free == CAPACITY

    run(body())


def test_checkpoints_wait_for_nothing_and_nothing_waits_for_them(
    run: Any, make_topology: Any, local_cluster: Any
) -> None:
    async def body() -> None:
        async with local_cluster(make_topology()) as h:
            await h.component("pool", build)
            await h.start(client := Client())
            await h.start(head := FakeHead())

            async def full(**changes: Any) -> PoolFull:
                fields = {"owner": "denoiser-0", "owner_generation": 1, "nbytes": half, **changes}
                return await client.reference("pool").ask(LeaseBlock(**fields), PoolFull, timeout_s=5)

            half = CAPACITY // 2
            output = await client.lease(owner="denoiser-0", nbytes=half)
            await full(attempt=W, checkpoint=True)
            assert head.told.empty()
            await client.release(output)
            # Its place was not kept: another gets the room.
            saved = await client.lease(owner="denoiser-0", nbytes=half, attempt=Attempt("r/1", 1), checkpoint=True)
            await client.seal(saved)
            encoder = await client.lease(nbytes=half, attempt=Attempt("r/2", 1))
            await full(attempt=W)
            assert await asyncio.wait_for(head.told.get(), 10) == MemoryPressure("pool", half, checkpoints=True)
            await client.release(saved)
            # The output of the same attempt is another block, and comes before any checkpoint.
            await full(attempt=Attempt("r/1", 1), nbytes=BLOCK, checkpoint=True)
            assert await client.lease(owner="denoiser-0", nbytes=half) != encoder

    run(body())


def test_what_is_refused_changes_nothing(run: Any, make_topology: Any, local_cluster: Any) -> None:
    async def body() -> None:
        async with local_cluster(make_topology()) as h:
            await h.component("pool", build, generation=9)
            await h.start(client := Client())
            lease = await client.lease()
            before = await client.report()
            stale = LeaseRef("pool", 8, lease.lease_id, lease.offset, lease.nbytes)
            unknown = LeaseRef("pool", 9, lease.lease_id + 1, lease.offset, lease.nbytes)
            elsewhere = LeaseRef("pool", 9, lease.lease_id, lease.offset + 4096, lease.nbytes)
            for wrong, code in ((stale, "stale_pool"), (unknown, "unknown_lease"), (elsewhere, "unknown_lease")):
                with pytest.raises(RemoteError) as refusal:
                    await client.seal(wrong)
                assert refusal.value.code == code
                assert await client.release(wrong) == 0
            with pytest.raises(RemoteError, match="too_large"):
                await client.reference("pool").ask(SealBlock(lease, 1, BLOCK + 1), BlockSealed, timeout_s=5)
            with pytest.raises(RemoteError, match="unknown_owner"):
                await client.lease(owner="nobody")
            assert await client.report() == before
            await client.seal(lease, 7)
            with pytest.raises(RemoteError, match="wrong_state"):
                await client.seal(lease, 8)
            await client.describe()

    run(body())


def test_what_a_dead_owner_was_writing_is_released_or_kept_for_its_request(
    run: Any, make_topology: Any, local_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "POOL_ANSWER_S", 0.1)

    async def body() -> None:
        async with local_cluster(make_topology()) as h:
            await h.component("pool", build)
            await h.start(client := Client())
            await h.start(Role("encoder-0"), generation=5)
            await h.start(Role("encoder-1"), generation=5)
            sealed = await client.lease(owner_generation=5)
            await client.seal(sealed)
            spare = await client.lease(owner_generation=5, attempt=Attempt("", 1))
            written = await client.lease(owner_generation=5, attempt=Attempt("r/1", 1))
            others = await client.lease(owner="encoder-1", owner_generation=5)
            assert spare in {view.lease for view in (await client.report()).leases}
            await h.kill("encoder-0")
            report = await client.until(lambda r: len(r.leases) == 3)
            states = {view.lease: view.state for view in report.leases}
            assert states == {sealed: "sealed", written: "sealed", others: "writing"}
            await client.describe()

    run(body())


def test_a_newer_incarnation_takes_the_place_of_an_older_one(run: Any, make_topology: Any, local_cluster: Any) -> None:
    async def body() -> None:
        async with local_cluster(make_topology()) as h:
            await h.component("pool", build)
            await h.start(client := Client())
            await client.lease(owner_generation=5, attempt=Attempt("", 1))
            newer = await client.lease(owner_generation=6)
            assert [view.lease for view in (await client.report()).leases] == [newer]
            with pytest.raises(RemoteError, match="stale_owner"):
                await client.lease(owner_generation=5)

    run(body())


def test_a_pool_that_cannot_be_made_fails_its_start(run: Any, make_topology: Any, local_cluster: Any) -> None:
    async def body() -> None:
        async with local_cluster(make_topology(pool_size="4000TiB")) as h:
            with pytest.raises(StartDelayedError, match="4000TiB"):
                await h.component("pool", build)

    run(body())


def test_incoming_and_outgoing_blocks_have_zones_of_their_own() -> None:
    page = 4096
    assert zones(6 * page, ("encoder", "denoiser")) == {"encoder": 3 * page}
    assert zones(7 * page, ("denoiser", "incoming")) == {"incoming": 3 * page}
    assert zones(6 * page, ("encoder",)) == zones(6 * page, ("incoming",)) == {}
    assert zones(7 * page, ("encoder", "denoiser", "incoming")) == {"encoder": 2 * page, "incoming": 2 * page}


def test_leases_are_reported_in_pages(
    run: Any, make_topology: Any, local_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LEASES_PER_REPORT", 2)

    async def body() -> None:
        async with local_cluster(make_topology()) as h:
            await h.component("pool", build)
            await h.start(client := Client())
            leases = [await client.lease(attempt=Attempt(f"r/{k}", 1)) for k in range(5)]
            found: list[LeaseRef] = []
            query, more = LeaseQuery(), True
            while more:
                report = await client.reference("pool").ask(query, LeaseReport, timeout_s=5)
                assert len(report.leases) <= 2
                found += [view.lease for view in report.leases]
                query, more = LeaseQuery(found[-1].lease_id), report.more
            assert found == leases

    run(body())


class PoolPair:
    """Two pools that do not share memory, and bytes at rest in the first."""

    def __init__(self, h: Any) -> None:
        self.h = h
        self.client = Client()

    async def start(self) -> LeaseRef:
        await self.h.start(self.client)
        self.pools = [
            BufferPool(self.h.topology.component(n), self.h.topology) for n in ("pool-encoder", "pool-denoiser")
        ]
        for pool in self.pools:
            await self.h.start(pool, generation=3, kind="pool")
        source = await self.client.lease("pool-encoder")
        self.memory("pool-encoder", source)[:] = b"\x5a" * BLOCK
        await self.client.seal(source)
        return source

    async def target(self) -> LeaseRef:
        return await self.client.lease("pool-denoiser", owner="denoiser-0", incoming=True)

    def memory(self, pool: str, lease: LeaseRef) -> memoryview:
        found = next(p for p in self.pools if p.name == pool)
        return found._store.arena.view(lease.offset, lease.nbytes)


class Gate:
    """A real backend in front of which pulls wait until a test opens it."""

    def __init__(self, pool: BufferPool) -> None:
        self.opened = threading.Event()
        self._backend = pool._store.transfers.backend
        pool._store.transfers.backend = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def pull(self, *arguments: Any) -> None:
        assert self.opened.wait(PATIENCE_S)
        self._backend.pull(*arguments)


TwoPools: TypeAlias = Callable[[PoolPair, LeaseRef], Coroutine[Any, Any, None]]


@pytest.fixture
def separate_pools(make_topology: Any) -> Any:
    """A topology with a pool for each kind, whose bytes are copied from one to the other."""
    return make_topology(engine="mooncake", backend="shm")


@pytest.fixture
def with_two_pools(run: Any, separate_pools: Any, local_cluster: Any) -> Callable[[TwoPools], None]:
    """Run a test with a pair of pools and a sealed block in the first."""

    def start(body: TwoPools) -> None:
        async def all_of_it() -> None:
            async with local_cluster(separate_pools) as h:
                two = PoolPair(h)
                await body(two, await two.start())

        run(all_of_it())

    return start


def test_bytes_travel_from_pool_to_pool(with_two_pools: Any) -> None:
    async def body(two: PoolPair, source: LeaseRef) -> None:
        target = await two.target()
        assert (await two.client.pull(source, target)).seconds >= 0
        assert checksum(two.memory("pool-denoiser", target)) == checksum(b"\x5a" * BLOCK)
        with pytest.raises(RemoteError, match="wrong_state"):
            await two.client.pull(source, target, nbytes=2 * BLOCK)
        assert await two.client.release(target) == 1
        assert (await two.client.describe("pool-denoiser")).leased == 0

    with_two_pools(body)


def test_a_block_that_is_loaded_is_not_filled_for_another_attempt(with_two_pools: Any) -> None:
    async def body(two: PoolPair, source: LeaseRef) -> None:
        fields = {"owner": "denoiser-0", "incoming": True, "attempt": Attempt("", 1)}
        ready = await two.client.lease("pool-denoiser", **fields)
        await two.client.pull(source, ready)
        with pytest.raises(RemoteError, match="is for r/0#1, not r/1#1"):
            await two.client.pull(source, ready, attempt=Attempt("r/1", 1))
        await two.client.pull(source, ready)  # whose bytes came damaged, and who loads nothing meanwhile

    with_two_pools(body)


def test_preallocated_blocks_are_released_for_an_arrival(run: Any, separate_pools: Any, local_cluster: Any) -> None:
    class Owner(Actor):
        told: asyncio.Queue[ReleasePreallocated] = asyncio.Queue()

        async def release_preallocated(self, message: ReleasePreallocated) -> None:
            self.told.put_nowait(message)

    async def body() -> None:
        async with local_cluster(separate_pools) as h:
            two = PoolPair(h)
            await two.start()
            await h.start(owner := Owner("denoiser-0"))
            fields = {"owner": "denoiser-0", "incoming": True, "nbytes": CAPACITY // 2}
            ready = await two.client.lease("pool-denoiser", **fields, attempt=Attempt("", 1))
            arrival = {**fields, "owner": "denoiser-1"}
            with pytest.raises(AssertionError, match="PoolFull"):
                await two.client.lease("pool-denoiser", **arrival)
            assert await asyncio.wait_for(owner.told.get(), 10) == ReleasePreallocated("pool-denoiser")
            await two.client.release(ready)
            with pytest.raises(AssertionError, match="PoolFull"):  # nothing is kept ready while somebody waits
                await two.client.lease("pool-denoiser", **fields, attempt=Attempt("", 2))
            await two.client.lease("pool-denoiser", **arrival)

    run(body())


def test_a_source_of_another_generation_is_gone(with_two_pools: Any) -> None:
    async def body(two: PoolPair, source: LeaseRef) -> None:
        target = await two.target()
        with pytest.raises(RemoteError, match="source_gone: the topology has no elsewhere any more"):
            await two.client.pull(msgspec.structs.replace(source, pool="elsewhere"), target)
        await two.h.kill("pool-encoder")
        await two.h.component("pool-encoder", build, generation=4)
        with pytest.raises(RemoteError) as refusal:
            await two.client.pull(source, target)
        assert refusal.value.code == "source_gone"
        assert await two.client.release(target) == 1

    with_two_pools(body)


def test_a_source_that_does_not_answer_is_not_read_from(with_two_pools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "POOL_ANSWER_S", 0.1)

    async def body(two: PoolPair, source: LeaseRef) -> None:
        target = await two.target()
        await two.h.kill("pool-encoder")
        with pytest.raises(RemoteError) as refusal:
            await two.client.pull(source, target)
        assert refusal.value.code == "transfer_failed"
        assert (await two.client.report("pool-denoiser")).leases[0].state == "writing"

    with_two_pools(body)


def test_a_block_that_is_being_filled_is_not_given_to_others_when_it_is_released(
    with_two_pools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "SWEEP_S", 0.01)

    async def body(two: PoolPair, source: LeaseRef) -> None:
        gate, target = Gate(two.pools[1]), await two.target()
        pulling = asyncio.ensure_future(two.client.pull(source, target, timeout_s=PATIENCE_S))
        await two.client.until(lambda _: two.pools[1]._filling, "pool-denoiser")
        with pytest.raises(RemoteError, match="being filled"):
            await two.client.pull(source, target)
        assert await two.client.release(target) == 1
        assert (await two.client.report("pool-denoiser")).leases[0].state == "quarantined"
        gate.opened.set()
        await pulling
        await two.client.until(lambda r: not r.leases, "pool-denoiser")
        await two.client.describe("pool-denoiser")

    with_two_pools(body)


def test_a_block_that_may_still_be_written_to_is_in_quarantine_until_it_is_not(
    with_two_pools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "QUARANTINE_S", 0.0)
    monkeypatch.setattr(pool_module, "SWEEP_S", 0.01)

    async def body(two: PoolPair, source: LeaseRef) -> None:
        gate, target = Gate(two.pools[1]), await two.target()
        with pytest.raises(RemoteError) as refusal:
            await two.client.pull(source, target, timeout_s=0.1)
        assert refusal.value.code == "transfer_failed"
        assert (await two.client.report("pool-denoiser")).leases[0].state == "quarantined"
        assert await two.client.release(target) == 0
        assert (await two.client.describe("pool-denoiser")).leased == BLOCK
        gate.opened.set()
        await two.client.until(lambda r: not r.leases, "pool-denoiser")
        assert (await two.client.describe("pool-denoiser")).free == CAPACITY

    with_two_pools(body)


def test_a_pool_answers_while_it_fetches(with_two_pools: Any) -> None:
    async def body(two: PoolPair, source: LeaseRef) -> None:
        gate = Gate(two.pools[1])
        pulling = asyncio.ensure_future(two.client.pull(source, await two.target(), timeout_s=PATIENCE_S))
        await two.client.until(lambda _: two.pools[1]._filling, "pool-denoiser")
        await two.client.lease("pool-denoiser", owner="denoiser-0", attempt=Attempt("r/1", 1))
        assert not pulling.done()
        gate.opened.set()
        await pulling

    with_two_pools(body)


def test_a_pool_refuses_before_it_is_open(make_topology: Any) -> None:
    topology = make_topology()
    with pytest.raises(RefusedError):
        _ = BufferPool(topology.component("pool"), topology)._store


def test_the_head_looks_through_every_page_of_a_pool(
    run: Any, make_topology: Any, local_cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "LEASES_PER_REPORT", 2)

    async def body() -> None:
        async with local_cluster(make_topology()) as h:
            await h.component("pool", build)
            await h.start(client := Client())
            await h.start(head := Actor("head"))
            for k in range(5):
                await client.seal(await client.lease(attempt=Attempt(f"gone/{k}", 1)))
            models = single_model(make_scheduler())
            runner = EffectRunner(head, models, notify=lambda _: None, on_outcome=lambda: None)
            monitor = Monitor(head, models, ("pool",), runner, lambda: None)
            monitor._pools["pool"] = 1
            await monitor.reclaim()
            assert (await client.describe()).leased == 0

    run(body())
