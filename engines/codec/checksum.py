"""xxh3_64 of bytes, fused with the copy that moves them. Imports no torch.

The checksum of a hop covers the bytes of a block from its start to its `nbytes`, gaps included. It guards
against damage and against bytes that never arrived, not against an attacker: xxh3 is no signature.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# A chunk is read twice, by the hash and by the copy. Half a MiB is still in a core's L2 cache for the second
# of them, and is long enough that taking the GIL again between chunks costs nothing.
CHUNK = 512 * 1024


class ChecksumMismatchError(Exception):
    """The bytes are not those that were stored."""

    def __init__(self, expected: int, found: int, nbytes: int) -> None:
        super().__init__(f"{nbytes} bytes have the checksum {found:016x}, not {expected:016x}: they are damaged")
        self.expected = expected
        self.found = found
        self.nbytes = nbytes


def checksum(memory: Bytes | memoryview | bytes) -> int:
    """Hash contiguous bytes: xxh3_64, an int of 64 bits, unsigned."""
    return xxhash.xxh3_64_intdigest(memory.data if isinstance(memory, np.ndarray) else memory)


def verify(memory: Bytes | memoryview | bytes, expected: int) -> None:
    """Raise ChecksumMismatchError unless contiguous `memory` has the checksum `expected`."""
    found = checksum(memory)
    if found != expected:
        raise ChecksumMismatchError(expected, found, len(memory))


class RunningChecksum:
    """A checksum over bytes that arrive in parts. Arrays are uint8, shape [bytes], contiguous."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()
        self._nbytes = 0

    @property
    def value(self) -> int:
        """The checksum of everything so far."""
        return self._state.intdigest()

    def update(self, memory: Bytes) -> None:
        """Hash bytes where they are."""
        self._state.update(memory.data)
        self._nbytes += len(memory)

    def copy(self, destination: Bytes, source: Bytes) -> None:
        """Copy, hashing what was read: damage on the way into `destination` will show when that is verified.

        Raises ValueError when the lengths differ.
        """
        _check_lengths(destination, source)
        for start in range(0, len(source), CHUNK):
            part = source[start : start + CHUNK]
            self.update(part)
            destination[start : start + CHUNK] = part

    def copy_checked(self, destination: Bytes, source: Bytes) -> None:
        """Copy, hashing what arrived: later changes of `source` cannot make unchecked bytes pass.

        Raises ValueError when the lengths differ.
        """
        _check_lengths(destination, source)
        for start in range(0, len(source), CHUNK):
            part = destination[start : start + CHUNK]
            part[:] = source[start : start + CHUNK]
            self.update(part)

    def expect(self, expected: int) -> None:
        """Raise ChecksumMismatchError unless everything so far has the checksum `expected`."""
        if self.value != expected:
            raise ChecksumMismatchError(expected, self.value, self._nbytes)


def _check_lengths(destination: Bytes, source: Bytes) -> None:
    if len(destination) != len(source):
        raise ValueError(f"cannot copy {len(source)} bytes onto {len(destination)}")
