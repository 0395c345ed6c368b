"""Topologies of components that need no torch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

THREE_ROLES = """
[[roles]]
kind = "encoder"
[[roles]]
kind = "denoiser"
[[roles]]
kind = "decoder"
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder with a path short enough for sockets."""
    made = Path(tempfile.mkdtemp(prefix="tr-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a topology; state and sockets go below its folder."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    monkeypatch.delenv("TRIPTYCH_STATE_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "home"))

    def write(text: str = "", roles: str = THREE_ROLES, model: str = '[model]\npath = "."\n') -> Path:
        file = folder / "cluster.toml"
        file.write_text(f"{model}{text}\n{roles}")
        return file

    return write
