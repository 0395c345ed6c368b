from __future__ import annotations

from typing import Any

import pytest

from tests.roles.cluster_harness import ClusterDriver, attempt
from triptych.bus import RemoteError
from triptych.engines.parameters.schema import Signature
from triptych.roles.head.registry import InstanceRegistry
from triptych.roles.messages import stages
from triptych.roles.messages.common import LeaseRef
from triptych.roles.messages.pool import ReleasePreallocated
from triptych.roles.messages.stages import RegisterInstance
from triptych.roles.worker.preallocation import Preallocation


def block_bytes(number: int, nbytes: int = 64, generation: int = 1) -> LeaseRef:
    return LeaseRef("pool-denoiser", generation, number, 0, nbytes)


def test_nothing_is_preallocated_before_the_first_arrival_or_beyond_the_count() -> None:
    preallocated = Preallocation(2)
    assert not preallocated.wanted
    preallocated.require(64)
    preallocated.add(block_bytes(1))
    assert preallocated.wanted
    preallocated.add(block_bytes(2))
    assert not preallocated.wanted
    assert not Preallocation(0).wanted


def test_a_larger_arrival_replaces_blocks_that_are_too_small() -> None:
    preallocated = Preallocation(2)
    preallocated.require(64)
    preallocated.add(block_bytes(1))
    assert preallocated.require(32) == ()
    assert preallocated.require(65) == (block_bytes(1),)
    assert preallocated.wanted


def test_each_block_is_used_once_and_each_lease_has_a_name_of_its_own() -> None:
    preallocated = Preallocation(2)
    preallocated.require(64)
    preallocated.add(block_bytes(1))
    assert preallocated.use(block_bytes(1))
    assert not preallocated.use(block_bytes(1))
    assert not preallocated.use(None)
    assert preallocated.next_attempt() != preallocated.next_attempt()


def test_blocks_of_an_earlier_pool_are_dropped() -> None:
    preallocated = Preallocation(2)
    preallocated.require(64)
    preallocated.add(block_bytes(1))
    preallocated.add(block_bytes(1, generation=2))
    assert preallocated.blocks == [block_bytes(1, generation=2)]


def test_the_head_takes_a_preallocated_block_that_fits_once_and_drops_those_of_an_earlier_incarnation() -> None:
    registry = InstanceRegistry()
    registration = RegisterInstance("denoiser-0", "denoiser", 5, 1, 2, 2, 0, "pool-denoiser", Signature(), ())
    registry.register(registration)
    registry.offer("denoiser-0", 4, [block_bytes(9)])
    assert registry.take_preallocated("denoiser-0", 1) is None
    registry.offer("denoiser-0", 5, [block_bytes(1, 64), block_bytes(2, 128)])
    assert registry.take_preallocated("denoiser-0", 100) == block_bytes(2, 128)
    assert registry.take_preallocated("denoiser-0", 100) is None
    assert registry.take_preallocated("denoiser-0", 64) == block_bytes(1, 64)
    assert registry.take_preallocated("elsewhere", 1) is None


def test_a_block_that_was_pushed_into_is_not_taken_again_from_an_offer_that_crossed_the_push() -> None:
    registry = InstanceRegistry()
    registry.register(RegisterInstance("denoiser-0", "denoiser", 5, 1, 2, 2, 0, "pool-denoiser", Signature(), ()))
    registry.offer("denoiser-0", 5, [block_bytes(1)])
    assert registry.take_preallocated("denoiser-0", 1) == block_bytes(1)
    registry.offer("denoiser-0", 5, [block_bytes(1), block_bytes(2)])
    assert registry.take_preallocated("denoiser-0", 1) == block_bytes(2)
    assert registry.take_preallocated("denoiser-0", 1) is None
    registry.offer("denoiser-0", 5, [block_bytes(3)])
    assert registry.instances["denoiser-0"].preallocated_taken == set()


def test_after_the_first_arrival_blocks_are_offered_and_what_is_pushed_into_one_needs_no_other(cluster: Any) -> None:
    async def body(driver: ClusterDriver) -> None:
        await driver.join("encoder-0", "denoiser-0")
        for number in (0, 1):
            source = await driver.encoded(attempt(number))
            if number == 0:
                alloc = stages.TransferAlloc(attempt(0), source.nbytes)
                target = (await driver.ask("denoiser-0", alloc, stages.TransferAllocated)).target
            else:
                target = await offered(driver, 2)
                assert target.nbytes >= source.nbytes
            await driver.push("denoiser-0", attempt(number), source, target)
            report = await driver.inbox.next(stages.StageOutputsStored)
            assert report.attempt == attempt(number)
        preallocated = await offered(driver, 2)
        assert preallocated != target
        source = await driver.encoded(attempt(2))
        driver.head.reference("denoiser-0").tell(ReleasePreallocated("pool-denoiser"))
        while (await driver.inbox.next(stages.BlocksOffered)).blocks:
            pass
        with pytest.raises(RemoteError, match="block_gone"):
            await driver.push("denoiser-0", attempt(2), source, preallocated)
        await driver.until(lambda: none_ready(driver))

    cluster(body, engine="mooncake", backend="shm")


async def none_ready(driver: ClusterDriver) -> bool:
    """Whether no block of the denoisers' pool is for no job."""
    return all(view.attempt.job_id for view in (await driver.leases("pool-denoiser")).leases)


async def offered(driver: ClusterDriver, count: int) -> LeaseRef:
    """The first block of the next offer of so many."""
    while len(blocks := (await driver.inbox.next(stages.BlocksOffered)).blocks) != count:
        pass
    return blocks[0]
