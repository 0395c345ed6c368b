"""A model's version changes with what would be loaded, and with nothing else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from triptych.engines.weights.model_version import model_version


def written(folder: Path) -> Path:
    (folder / "unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/config.json", "unet/model.safetensors", "lora.safetensors"):
        (folder / name).write_bytes(b"12345678")
    return folder


def retouch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "unet/model.safetensors").write_bytes(b"123456789"),
        lambda folder: retouch(folder / "unet/model.safetensors"),
        lambda folder: retouch(folder / "model_index.json"),
        lambda folder: (folder / "unet/model.safetensors").rename(folder / "unet/other.safetensors"),
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
    ],
)
def test_it_changes_with_names_sizes_and_times(change: Callable[[Path], object], tmp_path: Path) -> None:
    folder = written(tmp_path)
    before = model_version([folder])
    assert before == model_version([folder])
    change(folder)
    assert model_version([folder]) != before


def test_files_that_nothing_loads_are_not_part_of_it(tmp_path: Path) -> None:
    folder = written(tmp_path)
    before = model_version([folder])
    (folder / "README.md").write_text("x")
    (folder / "unet" / "out.png").write_bytes(b"x")
    assert model_version([folder]) == before


def test_an_adapter_is_part_of_it(tmp_path: Path) -> None:
    folder = written(tmp_path)
    lora = folder / "lora.safetensors"
    assert model_version([folder / "unet", lora]) != model_version([folder / "unet"])
    lora.unlink()
    assert model_version([folder / "unet", lora]) == model_version([folder / "unet"])


def test_copies_on_several_hosts_are_compared_by_their_bytes(tmp_path: Path) -> None:
    folders = written(tmp_path / "a"), written(tmp_path / "b")
    for folder in folders:
        (folder / "unet/model.safetensors").write_bytes(bytes(3 << 20))
    retouch(folders[0] / "unet/model.safetensors")
    before = model_version([folders[0]], by_content=True)
    assert model_version([folders[1]], by_content=True) == before
    assert model_version([folders[1]]) != model_version([folders[0]])
    found = {before}
    for name, at in (("model_index.json", 3), ("unet/model.safetensors", 0), ("unet/model.safetensors", -1)):
        content = bytearray((folders[1] / name).read_bytes())
        content[at] ^= 1
        (folders[1] / name).write_bytes(content)
        found.add(model_version([folders[1]], by_content=True))
    assert len(found) == 4
