from __future__ import annotations

import gc

import torch

from triptych.engines.memory.host_memory_pool import SMALL, HostMemoryPool


def test_a_block_comes_back_only_with_the_last_tensor_over_it():
    memory = HostMemoryPool()
    whole = memory.take(3 * SMALL)
    address = whole.data_ptr()
    part = whole[64:128].view(torch.float32).reshape(4, 4)
    del whole
    gc.collect()
    assert memory.take(3 * SMALL).data_ptr() != address
    del part
    gc.collect()
    again = [memory.take(3 * SMALL) for _ in range(2)]
    assert address in [block.data_ptr() for block in again]


def test_blocks_are_aligned_and_as_long_as_asked():
    memory = HostMemoryPool()
    for nbytes in (0, 1, SMALL - 1, SMALL, SMALL + 1, 5 * SMALL):
        block = memory.take(nbytes)
        assert (block.shape, block.dtype, block.data_ptr() % 64) == ((nbytes,), torch.uint8, 0)


def test_a_block_much_larger_than_asked_is_not_given():
    memory = HostMemoryPool()
    large = memory.take(64 * SMALL)
    address = large.data_ptr()
    del large
    gc.collect()
    assert memory.take(2 * SMALL).data_ptr() != address


def test_only_so_many_blocks_are_kept():
    memory = HostMemoryPool(keep=2)
    blocks = [memory.take(2 * SMALL) for _ in range(5)]
    addresses = [block.data_ptr() for block in blocks]
    del blocks
    gc.collect()
    assert len(memory._free) == 2
    assert memory.take(2 * SMALL).data_ptr() in addresses
