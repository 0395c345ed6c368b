"""Checksums (xxh3_64) of bytes, computed while they are copied. Imports no torch.

The checksum of a block covers its bytes from the start to `nbytes`, gaps between spans included. It detects damaged and
missing bytes. It does not protect against an attacker: xxh3 is not a signature.
"""

from __future__ import annotations

import numpy as np
import xxhash
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# Each chunk is read twice, by the hash and by the copy: half a MiB stays in the L2 cache between the two, and is large
# enough that acquiring the GIL for each chunk costs nothing.
CHUNK = 512 * 1024


class ChecksumMismatchError(Exception):
    """Bytes do not have the checksum that they were stored with.

    Attributes:
        expected: The checksum that they were stored with.
        found: The checksum that they have.
        nbytes: Their number.
    """

    def __init__(self, expected: int, found: int, nbytes: int) -> None:
        super().__init__(f"{nbytes} bytes have the checksum {found:016x}, not {expected:016x}: they are damaged")
        self.expected = expected
        self.found = found
        self.nbytes = nbytes


def checksum(memory: Bytes | memoryview | bytes) -> int:
    """Return the xxh3_64 of contiguous bytes, an unsigned int of 64 bits."""
    return xxhash.xxh3_64_intdigest(memory.data if isinstance(memory, np.ndarray) else memory)


def verify(memory: Bytes | memoryview | bytes, expected: int) -> None:
    """Raise ChecksumMismatchError unless contiguous `memory` has the checksum `expected`."""
    found = checksum(memory)
    if found != expected:
        raise ChecksumMismatchError(expected, found, len(memory))


class RunningChecksum:
    """A checksum of bytes that are given in parts. Arrays are uint8, shape [nbytes], contiguous."""

    def __init__(self) -> None:
        self._state = xxhash.xxh3_64()
        self._nbytes = 0

    @property
    def value(self) -> int:
        """The checksum of all bytes so far."""
        return self._state.intdigest()

    def update(self, memory: Bytes) -> None:
        """Add bytes to the checksum."""
        self._state.update(memory.data)
        self._nbytes += len(memory)

    def copy(self, destination: Bytes, source: Bytes) -> None:
        """Copy bytes and hash the source, so that a later check of `destination` detects damage by the copy.

        Raises:
            ValueError: The lengths differ.
        """
        _check_lengths(destination, source)
        for start in range(0, len(source), CHUNK):
            part = source[start : start + CHUNK]
            self.update(part)
            destination[start : start + CHUNK] = part

    def copy_checked(self, destination: Bytes, source: Bytes) -> None:
        """Copy bytes and hash the destination, so that a change of `source` meanwhile cannot go unchecked.

        Raises:
            ValueError: The lengths differ.
        """
        _check_lengths(destination, source)
        for start in range(0, len(source), CHUNK):
            part = destination[start : start + CHUNK]
            part[:] = source[start : start + CHUNK]
            self.update(part)

    def expect(self, expected: int) -> None:
        """Raise ChecksumMismatchError unless all bytes so far have the checksum `expected`."""
        if self.value != expected:
            raise ChecksumMismatchError(expected, self.value, self._nbytes)


def _check_lengths(destination: Bytes, source: Bytes) -> None:
    if len(destination) != len(source):
        raise ValueError(f"cannot copy {len(source)} bytes to {len(destination)} bytes")
