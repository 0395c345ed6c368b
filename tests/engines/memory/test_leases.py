from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from triptych.engines.memory.buddy import PAGE
from triptych.engines.memory.leases import IDS_PER_GENERATION, Lease, LeaseError, LeaseState, LeaseTable

CAPACITY = 24 * PAGE
OWNERS = st.sampled_from(["denoiser-0", "encoder-0"])
REQUESTS = st.sampled_from(["a", "b", "c"])
MOMENTS = st.integers(0, 5).map(float)


def outcome(call, *arguments) -> str:
    try:
        call(*arguments)
    except LeaseError as error:
        return error.code
    return "done"


class Traffic(RuleBasedStateMachine):
    """Any order of calls keeps the table consistent, and after the last one all bytes can be had back."""

    def __init__(self):
        super().__init__()
        self.table = LeaseTable(CAPACITY, zones={"small": 4 * PAGE})
        self.now = 0.0
        self.fences: dict[str, int] = {}

    @rule(
        owner=OWNERS,
        generation=st.integers(0, 4),
        request=REQUESTS,
        attempt=st.integers(1, 2),
        nbytes=st.integers(0, 9 * PAGE),
        zone=st.sampled_from(["", "small"]),
    )
    def lease(self, owner, generation, request, attempt, nbytes, zone):
        arguments = (owner, generation, request, attempt, nbytes, zone)
        if generation < self.fences.get(owner, 0):
            assert outcome(self.table.lease, *arguments) == "stale_owner"
        else:
            self.now += 1.0
            lease = self.table.lease(*arguments, now=self.now)
            assert lease is None or lease.capacity >= max(nbytes, 1)

    @precondition(lambda self: self.table.leases)
    @rule(data=st.data(), until=MOMENTS)
    def one_step(self, data, until):
        lease = data.draw(st.sampled_from(self.table.leases))
        step = data.draw(st.sampled_from(["seal", "release", "quarantine"]))
        arguments = {"seal": (7, lease.nbytes), "quarantine": (until,)}.get(step, ())
        assert outcome(getattr(self.table, step), lease.id, *arguments) in ("done", "wrong_state")

    @rule(owner=OWNERS, generation=st.integers(0, 4), held=st.booleans())
    def reclaim_owner(self, owner, generation, held):
        self.fences[owner] = max(generation, self.fences.get(owner, 0))
        self.table.reclaim_owner(owner, generation, [(0, PAGE)] if held else [])
        assert not any(
            lease.owner == owner and lease.owner_generation < generation
            for lease in self.table.in_state(LeaseState.WRITING)
        )

    @rule(now=MOMENTS)
    def expire(self, now):
        self.table.expire(now)
        assert all(lease.quarantined_until > now for lease in self.table.in_state(LeaseState.QUARANTINED))

    @invariant()
    def accounts_are_right(self):
        assert self.table.free + self.table.leased == CAPACITY
        spans = sorted((lease.offset, lease.offset + lease.capacity) for lease in self.table.leases)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        assert all((lease.offset < 4 * PAGE) == (lease.zone == "small") for lease in self.table.leases)

    def teardown(self):
        for owner in ("denoiser-0", "encoder-0"):
            self.table.reclaim_owner(owner, 100)
        for lease in self.table.leases:
            self.table.release(lease.id)
        self.table.expire(float("inf"))
        assert self.table.leases == ()
        assert self.table.free == CAPACITY
        assert self.table.lease("encoder-1", 1, "x", 1, 4 * PAGE, "small", now=100.0)
        assert self.table.lease("encoder-1", 1, "x", 1, 16 * PAGE, now=100.0)


TestTraffic = Traffic.TestCase
# Deadlines would measure the machine.
TestTraffic.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.fixture
def table() -> LeaseTable:
    return LeaseTable(CAPACITY)


def take(table: LeaseTable, *, owner="denoiser-0", generation=1, request="r", attempt=1, nbytes=PAGE, zone="") -> Lease:
    lease = table.lease(owner, generation, request, attempt, nbytes, zone)
    assert lease is not None
    return lease


def test_a_lease_is_written_sealed_and_released(table):
    lease = take(table, nbytes=5000)
    assert (lease.state, lease.capacity, table.leased) == (LeaseState.WRITING, 8192, 8192)
    sealed = table.seal(lease.id, 0xABC, 4321)
    assert (sealed.state, sealed.checksum, sealed.nbytes) == (LeaseState.SEALED, 0xABC, 4321)
    assert table.get(lease.id) == sealed
    assert table.release(lease.id) == sealed
    assert table.free == CAPACITY


def test_what_is_not_in_the_table_is_unknown(table):
    lease = take(table)
    table.release(lease.id)
    for call in (table.get, table.release, table.quarantine):
        assert outcome(call, lease.id) == "unknown_lease"
    assert outcome(table.seal, lease.id, 0, 0) == "unknown_lease"


def test_a_lease_is_sealed_once_and_within_its_size(table):
    lease = take(table)
    assert outcome(table.seal, lease.id, 0, PAGE + 1) == "too_large"
    assert outcome(table.seal, lease.id, 0, -1) == "too_large"
    table.seal(lease.id, 0, PAGE)
    assert outcome(table.seal, lease.id, 0, PAGE) == "wrong_state"


def test_a_full_pool_gives_none_and_says_what_could_never_fit(table):
    assert table.lease("denoiser-0", 1, "", 0, 17 * PAGE) is None
    assert table.largest_block() == 16 * PAGE
    take(table, nbytes=16 * PAGE)
    assert table.lease("denoiser-0", 1, "r", 1, 16 * PAGE) is None
    assert table.largest_block() == 16 * PAGE


def test_zones_lie_apart():
    table = LeaseTable(CAPACITY, zones={"encoder": 8 * PAGE})
    mine = take(table, nbytes=8 * PAGE, zone="encoder")
    assert table.lease("encoder-0", 1, "r", 1, 1, "encoder") is None
    assert (table.largest_block("encoder"), table.largest_block("denoiser")) == (8 * PAGE, 16 * PAGE)
    others = take(table, nbytes=16 * PAGE, zone="denoiser")
    assert (mine.offset, others.offset, table.free) == (0, 8 * PAGE, 0)
    table.release(mine.id)
    assert table.lease("denoiser-0", 1, "s", 1, 1, "decoder") is None, "it is not theirs, though it is free"


def test_a_refused_lease_is_granted_before_later_ones(table):
    small = sorted((take(table, request=f"s{k}", nbytes=8 * PAGE) for k in range(3)), key=lambda lease: lease.offset)
    assert table.lease("denoiser-0", 1, "large", 1, 16 * PAGE, now=10.0) is None
    assert table.first_waiting_bytes() == 16 * PAGE
    table.release(small[0].id)
    assert table.lease("denoiser-0", 1, "late", 1, 8 * PAGE, now=10.1) is None
    assert table.lease("denoiser-0", 1, "", 7, 8 * PAGE, now=10.1) is None, "nor in advance"
    assert table.lease("denoiser-0", 1, "large", 1, 16 * PAGE, now=11.9) is None, "half of it is there"
    table.release(small[1].id)
    assert table.lease("denoiser-0", 1, "large", 1, 16 * PAGE, now=12.0)
    assert table.first_waiting_bytes() == 8 * PAGE
    assert table.lease("denoiser-0", 1, "late", 1, 8 * PAGE, now=12.0) is None
    table.release(small[2].id)
    assert table.lease("denoiser-0", 1, "late", 1, 8 * PAGE, now=12.0)
    assert table.first_waiting_bytes() == 0


def test_a_place_in_the_queue_ends_with_its_owner(table):
    held = take(table, request="s", nbytes=16 * PAGE)
    assert table.lease("denoiser-1", 1, "dead", 1, 16 * PAGE, now=10.0) is None
    table.reclaim_owner("denoiser-1", 2)
    assert table.first_waiting_bytes() == 0
    assert table.lease("denoiser-2", 1, "silent", 1, 16 * PAGE, now=10.0) is None
    table.release(held.id)
    assert table.lease("denoiser-0", 1, "r", 1, PAGE, now=11.0) is None
    assert table.lease("denoiser-0", 1, "r", 1, PAGE, now=12.1)


def test_leases_are_listed_in_pages(table):
    ids = [take(table, request=f"s{k}").id for k in range(5)]
    table.release(ids[1])
    assert [lease.id for lease in table.page(0, 2)] == [ids[0], ids[2]]
    assert [lease.id for lease in table.page(ids[2], 9)] == ids[3:]


def test_a_block_taken_in_advance_is_assigned_once(table):
    lease = take(table, request="", attempt=0)
    assigned = table.assign(lease.id, "r", 2)
    assert (assigned.request_id, assigned.attempt) == ("r", 2)
    assert outcome(table.assign, lease.id, "s", 1) == "wrong_state"


def test_a_dead_owner_loses_what_it_was_writing_for_no_request_and_nothing_else(table):
    spare, sealed, successor = take(table, request=""), take(table), take(table, generation=2)
    other = take(table, owner="encoder-0")
    table.seal(sealed.id, 1, PAGE)
    assert table.reclaim_owner("denoiser-0", 2) == [spare]
    assert {lease.id for lease in table.leases} == {sealed.id, successor.id, other.id}


def test_a_block_that_a_dead_owner_was_writing_for_a_request_is_kept_for_it(table):
    lease = take(table)
    assert table.reclaim_owner("denoiser-0", 2) == [lease]
    assert table.get(lease.id).state is LeaseState.SEALED, "it may have been reported before it was sealed"


def test_a_fenced_incarnation_gets_no_lease(table):
    table.reclaim_owner("denoiser-0", 5)
    assert outcome(table.lease, "denoiser-0", 4, "r", 1, 1) == "stale_owner"
    take(table, generation=5)


def test_a_fenced_incarnation_cannot_seal_what_was_reclaimed(table):
    lease = take(table, request="")
    table.reclaim_owner("denoiser-0", 2)
    take(table, generation=2)
    assert outcome(table.seal, lease.id, 1, 1) == "unknown_lease"


def test_a_block_that_a_transfer_still_fills_is_not_free_when_its_owner_dies(table):
    lease = take(table)
    held = [(lease.offset + 100, 1)]
    assert table.reclaim_owner("denoiser-0", 2, held) == [lease]
    assert table.get(lease.id).state is LeaseState.QUARANTINED
    assert table.expire(1.0, held) == []
    assert [freed.id for freed in table.expire(1.0)] == [lease.id]
    assert table.free == CAPACITY


def test_quarantine_outlasts_a_release_and_ends_in_time(table):
    lease = take(table)
    table.quarantine(lease.id, until=10.0)
    assert table.release(lease.id).state is LeaseState.QUARANTINED
    assert table.free == CAPACITY - PAGE
    assert table.expire(9.9) == []
    assert [freed.id for freed in table.expire(10.0)] == [lease.id]
    assert table.free == CAPACITY


def test_ids_of_two_incarnations_differ():
    before, after = (
        LeaseTable(CAPACITY, generation=1_700_000_000_000),
        LeaseTable(CAPACITY, generation=1_700_000_000_001),
    )
    assert take(after).id - take(before).id == IDS_PER_GENERATION
    assert take(after).id < 2**63


def test_a_lease_survives_the_wire(table):
    lease = table.seal(take(table).id, 2**64 - 1, PAGE)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(lease), type=Lease) == lease
