from __future__ import annotations

from pathlib import Path

import pytest

from triptych.engines.weights.read_ahead import read_ahead
from triptych.engines.weights.read_progress import ReadProgress, size_text


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
