"""Memory of the host that comes back when the last tensor over it is gone.

New memory of the size of latents costs more in page faults than all copies of a hop together. On CUDA the caching
allocators of torch keep memory; on the CPU nothing does.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

import torch

SMALL = 1 << 20
_HUGE_PAGE = 2 << 20


class HostMemoryPool:
    """Keeps up to `keep` blocks that are not in use. `take` is for one thread."""

    def __init__(self, keep: int = 4) -> None:
        self._free: deque[mmap.mmap] = deque(maxlen=keep)

    def take(self, nbytes: int) -> torch.Tensor:
        """Give memory of unknown content: uint8, shape [nbytes]. It is kept for reuse once no tensor views it."""
        if nbytes < SMALL:
            return torch.empty(nbytes, dtype=torch.uint8)
        size = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
        block = self._kept(size) or _new_block(size)
        # A tensor made from it holds the view, not the block: its end is that of the last tensor.
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
        # Runs wherever the last tensor ends, garbage collection included, so it takes no lock: a full deque drops
        # its oldest block by itself.
        self._free.append(block)


def _new_block(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block
