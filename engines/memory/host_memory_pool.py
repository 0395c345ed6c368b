"""Reuse of host memory when the last tensor over it is freed.

New memory for latents costs more in page faults than all copies between two stages together. On CUDA, torch has caching
allocators; on the CPU it has none.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import torch

SMALL = 1 << 20
"""Blocks of fewer bytes are not worth keeping."""
_HUGE_PAGE = 2 << 20


class HostMemoryPool:
    """Keeps up to `keep` free blocks. Call `take` on one thread only."""

    def __init__(self, keep: int = 4) -> None:
        self._free: deque[mmap.mmap] = deque(maxlen=keep)

    def take(self, nbytes: int) -> torch.Tensor:
        """Return memory of undefined content: uint8, shape [nbytes]; it is reused when no tensor views it any more."""
        if nbytes < SMALL:
            return torch.empty(nbytes, dtype=torch.uint8)
        size = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
        block = self._kept(size) or _new_block(size)
        # The tensors hold this view and not the block, so the view is freed with the last of them.
        view = memoryview(block)
        weakref.finalize(view, self._give_back, block).atexit = False
        return torch.frombuffer(view, dtype=torch.uint8, count=nbytes)

    def _kept(self, size: int) -> mmap.mmap | None:
        fitting = [block for block in list(self._free) if size <= len(block) <= 2 * size]
        if not fitting:
            return None
        block = min(fitting, key=len)
        self._free.remove(block)
        return block

    def _give_back(self, block: mmap.mmap) -> None:
        # Takes no lock, since it runs where the last tensor is freed, garbage collection included. A full deque drops
        # its oldest block by itself.
        self._free.append(block)


def _new_block(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block
