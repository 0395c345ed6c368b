from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.engines.memory.buddy import PAGE, BuddyAllocator, block_bytes

capacities = st.integers(1, 96).map(lambda pages: pages * PAGE)
# A number below 0 frees one of the blocks in use, any other allocates that many bytes.
traffic = st.lists(st.one_of(st.just(-1), st.integers(0, 40 * PAGE)), max_size=80)


@settings(deadline=None)
@given(capacity=capacities, steps=traffic, choose=st.randoms(use_true_random=False))
def test_blocks_never_overlap_and_all_bytes_come_back(capacity, steps, choose):
    buddy = BuddyAllocator(capacity)
    pristine = buddy.largest_free
    used: dict[int, int] = {}
    for step in steps:
        if step < 0:
            if used:
                offset = choose.choice(sorted(used))
                buddy.free(offset)
                del used[offset]
        elif (offset := buddy.allocate(step)) is not None:
            size = buddy.block_size(offset)
            assert size >= max(step, 1)
            assert size == block_bytes(step, buddy.min_block)
            assert offset % size == 0, "a block is aligned to its size"
            assert 0 <= offset <= capacity - size
            assert all(offset + size <= other or other + length <= offset for other, length in used.items())
            used[offset] = size
        else:
            assert buddy.largest_free < block_bytes(step, buddy.min_block), "refused though a block was free"
        assert buddy.used_bytes == sum(used.values())
        assert buddy.free_bytes + buddy.used_bytes == capacity
    for offset in used:
        buddy.free(offset)
    assert buddy.free_bytes == capacity
    assert buddy.largest_free == pristine, "free buddies were not merged"


@settings(deadline=None)
@given(pages=st.integers(1, 200))
def test_every_page_of_any_capacity_can_be_used(pages):
    buddy = BuddyAllocator(pages * PAGE)
    offsets = {buddy.allocate(1) for _ in range(pages)}
    assert offsets == {page * PAGE for page in range(pages)}
    assert buddy.allocate(1) is None
    assert buddy.largest_free == 0


def test_a_capacity_that_is_no_power_of_two_gives_its_largest_power_of_two():
    buddy = BuddyAllocator(96 << 20)
    assert buddy.largest_block == 64 << 20
    assert buddy.allocate(64 << 20) == 0
    assert buddy.allocate(32 << 20) == 64 << 20
    assert buddy.free_bytes == 0


def test_nothing_still_takes_a_block():
    buddy = BuddyAllocator(2 * PAGE)
    assert {buddy.allocate(0), buddy.allocate(0)} == {0, PAGE}


@pytest.mark.parametrize("capacity", [0, -PAGE, PAGE - 1, PAGE + 1])
def test_a_capacity_that_is_no_multiple_of_the_block_is_refused(capacity):
    with pytest.raises(ValueError, match="multiple of 4096"):
        BuddyAllocator(capacity)


@pytest.mark.parametrize("min_block", [0, 64, 2048, 3 * PAGE])
def test_a_block_below_a_page_or_no_power_of_two_is_refused(min_block):
    with pytest.raises(ValueError, match="power of two"):
        BuddyAllocator(12 * PAGE, min_block)


def test_freeing_what_is_not_in_use_is_refused():
    buddy = BuddyAllocator(4 * PAGE)
    offset = buddy.allocate(2 * PAGE)
    assert offset == 0
    with pytest.raises(ValueError, match="no block"):
        buddy.free(PAGE)
    buddy.free(offset)
    with pytest.raises(ValueError, match="no block"):
        buddy.free(offset)
    assert buddy.free_bytes == 4 * PAGE


def test_negative_sizes_are_refused():
    with pytest.raises(ValueError, match="-1"):
        BuddyAllocator(PAGE).allocate(-1)


@pytest.mark.parametrize("nbytes", [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 4 * PAGE, 5 * PAGE])
def test_a_block_has_the_size_that_is_reckoned_with(nbytes):
    buddy = BuddyAllocator(64 * PAGE)
    assert buddy.block_size(buddy.allocate(nbytes)) == block_bytes(nbytes)
