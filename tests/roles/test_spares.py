from __future__ import annotations

from typing import Any

import pytest

from tests.roles.stage import Stage, work
from triptych.bus import RemoteFailure
from triptych.engines.parameters import Signature
from triptych.roles.fleet import Fleet
from triptych.roles.messages import stages
from triptych.roles.messages.pool import SparesWanted
from triptych.roles.messages.stages import InstanceHello
from triptych.roles.messages.work import LeaseRef
from triptych.roles.spares import Spares


def slot(number: int, nbytes: int = 64, generation: int = 1) -> LeaseRef:
    return LeaseRef("pool-denoiser", generation, number, 0, nbytes)


def test_nothing_is_kept_ready_before_the_first_arrival_or_beyond_the_count() -> None:
    spares = Spares(2)
    assert not spares.wanted
    spares.learn(64)
    spares.add(slot(1))
    assert spares.wanted
    spares.add(slot(2))
    assert not spares.wanted
    assert not Spares(0).wanted


def test_a_larger_arrival_replaces_slots_that_are_too_small() -> None:
    spares = Spares(2)
    spares.learn(64)
    spares.add(slot(1))
    assert spares.learn(32) == ()
    assert spares.learn(65) == (slot(1),)
    assert spares.wanted


def test_each_slot_is_used_once_and_each_lease_has_a_name_of_its_own() -> None:
    spares = Spares(2)
    spares.learn(64)
    spares.add(slot(1))
    assert spares.use(slot(1))
    assert not spares.use(slot(1))
    assert not spares.use(None)
    assert spares.next_work() != spares.next_work()


def test_slots_of_an_earlier_pool_are_dropped() -> None:
    spares = Spares(2)
    spares.learn(64)
    spares.add(slot(1))
    spares.add(slot(1, generation=2))
    assert spares.slots == [slot(1, generation=2)]


def test_the_head_takes_a_spare_that_fits_once_and_forgets_those_of_an_earlier_incarnation() -> None:
    fleet = Fleet()
    hello = InstanceHello("denoiser-0", "denoiser", 5, 1, 2, 2, 0, "pool-denoiser", Signature(), ())
    fleet.welcome(hello)
    fleet.offer("denoiser-0", 4, [slot(9)])
    assert fleet.take_spare("denoiser-0", 1) is None
    fleet.offer("denoiser-0", 5, [slot(1, 64), slot(2, 128)])
    assert fleet.take_spare("denoiser-0", 100) == slot(2, 128)
    assert fleet.take_spare("denoiser-0", 100) is None
    assert fleet.take_spare("denoiser-0", 64) == slot(1, 64)
    assert fleet.take_spare("elsewhere", 1) is None


def test_a_slot_that_was_pushed_into_is_not_taken_again_from_an_offer_that_crossed_the_push() -> None:
    fleet = Fleet()
    fleet.welcome(InstanceHello("denoiser-0", "denoiser", 5, 1, 2, 2, 0, "pool-denoiser", Signature(), ()))
    fleet.offer("denoiser-0", 5, [slot(1)])
    assert fleet.take_spare("denoiser-0", 1) == slot(1)
    fleet.offer("denoiser-0", 5, [slot(1), slot(2)])
    assert fleet.take_spare("denoiser-0", 1) == slot(2)
    assert fleet.take_spare("denoiser-0", 1) is None
    fleet.offer("denoiser-0", 5, [slot(3)])
    assert fleet.instances["denoiser-0"].spares_taken == set()


def test_after_the_first_arrival_slots_are_offered_and_what_is_pushed_into_one_needs_no_other(cluster: Any) -> None:
    async def body(stage: Stage) -> None:
        await stage.join("encoder-0", "denoiser-0")
        for number in (0, 1):
            source = await stage.encoded(work(number))
            if number == 0:
                alloc = stages.TransferAlloc(work(0), source.nbytes)
                target = (await stage.ask("denoiser-0", alloc, stages.TransferAllocated)).target
            else:
                target = await offered(stage, 2)
                assert target.nbytes >= source.nbytes
            await stage.push("denoiser-0", work(number), source, target)
            report = await stage.inbox.next(stages.TransferStaged)
            assert report.work == work(number)
        spare = await offered(stage, 2)
        assert spare != target
        source = await stage.encoded(work(2))
        stage.head.reference("denoiser-0").tell(SparesWanted("pool-denoiser"))
        while (await stage.inbox.next(stages.SlotsOffered)).slots:
            pass
        with pytest.raises(RemoteFailure, match="slot_gone"):
            await stage.push("denoiser-0", work(2), source, spare)
        await stage.until(lambda: none_ready(stage))

    cluster(body, engine="mooncake", backend="shm")


async def none_ready(stage: Stage) -> bool:
    """Whether no slot of the denoisers' pool is for no unit."""
    return all(view.work.unit_id for view in (await stage.leases("pool-denoiser")).leases)


async def offered(stage: Stage, count: int) -> LeaseRef:
    """The first slot of the next offer of so many."""
    while len(slots := (await stage.inbox.next(stages.SlotsOffered)).slots) != count:
        pass
    return slots[0]
