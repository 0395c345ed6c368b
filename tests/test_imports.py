"""The import arrows of docs/architecture.md, and what may never be imported at all."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ARROWS = {
    "bus": set(),
    "engines": set(),
    "actors": {"bus"},
    "roles": {"actors", "engines", "bus"},
    "api": {"roles", "engines", "actors", "bus"},
    "actors/command": {"api", "roles", "engines", "actors", "bus"},  # the program: on top of everything
}
FORBIDDEN = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "zmq.asyncio"}


def imported(module: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", ARROWS)
def test_modules_import_only_down_the_arrows(package: str) -> None:
    for module in (ROOT / package).rglob("*.py"):
        if package == "actors" and module.is_relative_to(ROOT / "actors" / "command"):
            continue
        names = imported(module)
        ours = {name.split(".")[1] for name in names if name.startswith("triptych.")}
        assert ours <= ARROWS[package] | {package}, module
        assert not {name.partition(".")[0] for name in names} & (ARROWS.keys() | {"tools", "tests"}), module
        assert not names & FORBIDDEN, module


@pytest.mark.parametrize(
    "module",
    ["triptych.bus", "triptych.actors", "triptych.roles.head.head", "triptych.roles.pool.pool", "triptych.api.server"],
)
def test_what_does_no_tensor_work_starts_without_torch(module: str) -> None:
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
