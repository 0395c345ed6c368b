"""A buddy allocator of byte ranges. It owns no memory and imports no torch.

Method: K. C. Knowlton, "A Fast Storage Allocator", Communications of the ACM 8(10), 1965. A block of `size` bytes has
an offset that is a multiple of `size`; its buddy is at `offset ^ size`; two free buddies merge. A capacity that is no
power of two is divided into descending powers of two, so that each block is still aligned to its size. The buddy of
such a root would be in the smaller remainder behind it, which has no block of that size, so it needs no special case.
"""

from __future__ import annotations

from bisect import bisect_left, insort

PAGE = 4096
"""The size in bytes of the smallest block."""


def block_bytes(nbytes: int, min_block: int = PAGE) -> int:
    """Return the size in bytes of a block for `nbytes` bytes; raises ValueError for a negative number."""
    if nbytes < 0:
        raise ValueError(f"cannot allocate {nbytes} bytes")
    return max(min_block, 1 << max(nbytes - 1, 0).bit_length())


class BuddyAllocator:
    """Allocates blocks of `[0, capacity)`: powers of two of at least `min_block` bytes, lowest offset first.

    Args:
        capacity: The number of bytes.
        min_block: The size of the smallest block in bytes.

    Raises:
        ValueError: `min_block` is not a power of two of at least 4096, or `capacity` not a positive multiple of it.
    """

    def __init__(self, capacity: int, min_block: int = PAGE) -> None:
        if min_block < PAGE or min_block & (min_block - 1):
            raise ValueError(f"min_block must be a power of two of at least {PAGE} bytes, not {min_block}")
        if capacity < min_block or capacity % min_block:
            raise ValueError(f"capacity must be a positive multiple of {min_block} bytes, not {capacity}")
        self.capacity = capacity
        self.min_block = min_block
        self._free: dict[int, list[int]] = {}
        self._used: dict[int, int] = {}
        self._used_bytes = 0
        for size, offset in _roots(capacity):
            self._free[size] = [offset]

    @property
    def used_bytes(self) -> int:
        """The bytes of allocated blocks, rounding included."""
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        """The bytes of free blocks; `free_bytes + used_bytes == capacity`."""
        return self.capacity - self._used_bytes

    @property
    def largest_free(self) -> int:
        """The size in bytes of the largest free block; 0 if there is none."""
        return max((size for size, offsets in self._free.items() if offsets), default=0)

    @property
    def largest_block(self) -> int:
        """The size in bytes of the largest block when all are free."""
        return 1 << (self.capacity.bit_length() - 1)

    def allocate(self, nbytes: int) -> int | None:
        """Allocate a block of at least `nbytes` bytes; returns its offset, or None if no free block is large enough."""
        wanted = block_bytes(nbytes, self.min_block)
        size = min((s for s, offsets in self._free.items() if offsets and s >= wanted), default=None)
        if size is None:
            return None
        offset = self._free[size].pop(0)
        while size > wanted:
            size //= 2
            insort(self._free.setdefault(size, []), offset + size)
        self._used[offset] = size
        self._used_bytes += size
        return offset

    def block_size(self, offset: int) -> int:
        """Return the size in bytes of the allocated block at `offset`; raises ValueError if there is none."""
        size = self._used.get(offset)
        if size is None:
            raise ValueError(f"no block is allocated at offset {offset}")
        return size

    def free(self, offset: int) -> None:
        """Free the block at `offset` and merge it with its free buddies; raises ValueError if there is none."""
        size = self.block_size(offset)
        del self._used[offset]
        self._used_bytes -= size
        while self._take_free(offset ^ size, size):
            offset &= ~size
            size *= 2
        insort(self._free.setdefault(size, []), offset)

    def _take_free(self, offset: int, size: int) -> bool:
        offsets = self._free.get(size, [])
        at = bisect_left(offsets, offset)
        if at == len(offsets) or offsets[at] != offset:
            return False
        del offsets[at]
        return True


def _roots(capacity: int) -> list[tuple[int, int]]:
    roots = []
    offset = 0
    while offset < capacity:
        size = 1 << ((capacity - offset).bit_length() - 1)
        roots.append((size, offset))
        offset += size
    return roots
