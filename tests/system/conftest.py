"""Whole clusters of real processes, on tiny models made from configs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ("encoder", "denoiser", "decoder")


@pytest.fixture
def topology_file(tmp_path: Path, models: Callable[[str], Path]) -> Callable[..., Path]:
    """Writes a topology: sections as keyword arguments, `roles` as kind to number of instances."""

    def write(family: str = "flux", roles: dict[str, int] | None = None, **sections: dict[str, Any]) -> Path:
        return write_topology(tmp_path, models(family), roles or dict.fromkeys(STAGES, 1), sections)

    return write


@pytest.fixture
def topology_of(tmp_path: Path) -> Callable[..., Path]:
    """Writes a topology for a model's folder, of one instance of each stage or of `roles`."""

    def write(model: Path, roles: dict[str, int] | None = None) -> Path:
        return write_topology(tmp_path, model, roles or dict.fromkeys(STAGES, 1), {})

    return write


def write_topology(folder: Path, model: Path, roles: dict[str, int], sections: dict[str, dict[str, Any]]) -> Path:
    own = {
        "model": {"path": str(model), "dtype": "float32"},
        "state": {"path": str(folder / "state")},
        "transfer": {"pool_size": "16MiB"},
    }
    lines = []
    for name, keys in {name: own.get(name, {}) | sections.get(name, {}) for name in own | sections}.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_toml(value)}" for key, value in keys.items()]
    for kind, count in roles.items():
        lines += ["[[roles]]", f'kind = "{kind}"', f"count = {count}"]
    path = folder / "topology.toml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
