"""Weights files are brought into the page cache; other files are left alone."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from triptych.engines.weights.read_ahead import read_ahead
from triptych.engines.weights.read_progress import ReadProgress

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
