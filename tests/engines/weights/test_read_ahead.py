"""Weights files are brought into the page cache; other files are left alone."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from triptych.engines.weights.read_ahead import ReadProgress, read_ahead, size_text

SIZE = 8 << 20


def resident(path: Path) -> float:
    """The share of a file's pages that are in memory."""
    pages = (ctypes.c_ubyte * (SIZE // mmap.PAGESIZE))()
    with path.open("rb") as file, mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_READ) as mapped:
        address = np.frombuffer(mapped, dtype=np.uint8).ctypes.data
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(address), ctypes.c_size_t(SIZE), pages) == 0
    return sum(page & 1 for page in pages) / len(pages)


def cold(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def test_weights_of_all_components_come_into_memory(tmp_path: Path) -> None:
    files = [cold(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    other = cold(tmp_path / "one" / "model.bin")
    if resident(other) == 1.0:
        pytest.skip("files of this folder are always in memory, as on tmpfs")
    read_ahead([*files, tmp_path / "none" / "model.safetensors"], ReadProgress())
    while not all(resident(file) == 1.0 for file in files):
        pass
    assert resident(other) < 1.0


def test_what_is_read_is_what_came_ahead_or_what_is_complete_and_never_more_than_there_is(tmp_path: Path) -> None:
    progress = ReadProgress()
    assert (str(progress), progress.read) == ("", 0)
    progress.expect(24_000_000_000)
    progress.ahead(3_100_000_000)
    assert str(progress) == "3.1 of 24.0 GB"
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(1000))
    progress.complete([file])
    assert progress.read == 3_100_000_000
    progress.ahead(30_000_000_000)
    assert progress.read == progress.total


def test_reading_ahead_says_how_much_there_is_before_it_returns(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(5000))
    progress = ReadProgress()
    read_ahead([file, tmp_path / "none.safetensors"], progress)
    assert progress.total == 5000


@pytest.mark.parametrize(("nbytes", "text"), [(24e9, "24.0 GB"), (3.26e6, "3.3 MB"), (12, "0.0 kB")])
def test_sizes_are_written_for_people(nbytes: float, text: str) -> None:
    assert size_text(nbytes) == text
