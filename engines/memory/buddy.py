"""A buddy allocator over byte offsets. It owns no memory and imports no torch.

Method: K. C. Knowlton, "A Fast Storage Allocator", Communications of the ACM 8(10), 1965. A block of `size`
bytes lies at a multiple of `size`; its buddy is at `offset ^ size`; two free buddies merge. A capacity that
is no power of two is laid out as descending powers of two, so every block is aligned to its own size there
too: the buddy of such a root would lie in the smaller remainder behind it, where no block of that size can
exist, hence no special case.
"""

from __future__ import annotations

from bisect import bisect_left, insort

PAGE = 4096


class BuddyAllocator:
    """Hands out blocks of `[0, capacity)`: powers of two of at least `min_block` bytes, lowest first.

    Raises ValueError if `min_block` is no power of two of at least 4096, or `capacity` no positive multiple
    of it.
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
        """Bytes in blocks that are handed out, rounding included."""
        return self._used_bytes

    @property
    def free_bytes(self) -> int:
        """Bytes in free blocks; `free_bytes + used_bytes == capacity`."""
        return self.capacity - self._used_bytes

    @property
    def largest_free(self) -> int:
        """Size in bytes of the largest block that `allocate` could give now; 0 when all are in use."""
        return max((size for size, offsets in self._free.items() if offsets), default=0)

    @property
    def largest_block(self) -> int:
        """Size in bytes of the largest block that an empty allocator can give."""
        return 1 << (self.capacity.bit_length() - 1)

    def rounded(self, nbytes: int) -> int:
        """Size in bytes of the block that `nbytes` would take. Raises ValueError for a negative number."""
        if nbytes < 0:
            raise ValueError(f"cannot allocate {nbytes} bytes")
        return max(self.min_block, 1 << max(nbytes - 1, 0).bit_length())

    def allocate(self, nbytes: int) -> int | None:
        """Take a block of at least `nbytes` bytes: its offset, or None when no free block is large enough."""
        wanted = self.rounded(nbytes)
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
        """Size in bytes of the block in use at `offset`. Raises ValueError when there is none."""
        size = self._used.get(offset)
        if size is None:
            raise ValueError(f"no block is in use at offset {offset}")
        return size

    def free(self, offset: int) -> None:
        """Give the block at `offset` back and merge it with its free buddies.

        Raises ValueError when none is in use.
        """
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
