from __future__ import annotations

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.engines.codec.checksum import CHUNK, ChecksumMismatchError, RunningChecksum, checksum, verify


def some_bytes(nbytes: int) -> np.ndarray:
    return np.random.default_rng(nbytes).integers(0, 256, nbytes, dtype=np.uint8)


@pytest.mark.parametrize("nbytes", [0, 1, CHUNK - 1, CHUNK, 2 * CHUNK + 17])
@pytest.mark.parametrize("how", ["copy", "copy_checked"])
def test_copying_hashes_what_is_copied(nbytes, how):
    source, destination = some_bytes(nbytes), np.zeros(nbytes, dtype=np.uint8)
    running = RunningChecksum()
    getattr(running, how)(destination, source)
    assert np.array_equal(destination, source)
    assert running.value == xxhash.xxh3_64_intdigest(source.tobytes())
    running.expect(running.value)


@settings(deadline=None)
@given(parts=st.lists(st.binary(max_size=40), max_size=6))
def test_parts_hash_as_their_whole(parts):
    running = RunningChecksum()
    for part in parts:
        running.update(np.frombuffer(part, dtype=np.uint8))
    assert running.value == checksum(b"".join(parts))


@settings(deadline=None)
@given(place=st.integers(0, 2 * CHUNK + 16), bit=st.integers(0, 7))
def test_one_changed_bit_anywhere_is_seen(place, bit):
    memory = some_bytes(2 * CHUNK + 17)
    expected = checksum(memory)
    verify(memory, expected)
    memory[place] ^= 1 << bit
    with pytest.raises(ChecksumMismatchError) as caught:
        verify(memory, expected)
    assert (caught.value.expected, caught.value.nbytes) == (expected, len(memory))


def test_lengths_must_agree():
    running = RunningChecksum()
    for copy in (running.copy, running.copy_checked):
        with pytest.raises(ValueError, match="2 bytes to 3"):
            copy(np.zeros(3, dtype=np.uint8), np.zeros(2, dtype=np.uint8))


def test_a_running_checksum_refuses_another():
    running = RunningChecksum()
    running.update(some_bytes(10))
    with pytest.raises(ChecksumMismatchError, match="10 bytes"):
        running.expect(running.value ^ 1)
