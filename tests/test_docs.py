"""The documentation names what is there."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = "actors|api|bus|engines|roles|tools"
PAGES = sorted([*(ROOT / "docs").rglob("*.md"), *ROOT.glob("*.md"), *(ROOT / "examples").rglob("*.md")])
NAME = re.compile(rf"(?:`|^::: )(?:triptych\.)?((?:{FOLDERS})(?:\.\w+)+)(?:\(\))?(?:`|$)", re.MULTILINE)
FILE = re.compile(rf"\b((?:{FOLDERS}|docs|tests|examples)/[\w/.-]*\w)")
A_FILE_OF_THE_STATE = "bus.key"


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def _missing(name: str) -> bool:
    """Whether a dotted name leads to no module, and no class, function or import of one."""
    parts = name.split(".")
    folder = ROOT
    while parts and (folder / parts[0]).is_dir():
        folder /= parts.pop(0)
    if not parts:
        return False
    file = folder / f"{parts[0]}.py"
    if file.is_file():
        parts.pop(0)
    else:
        file = folder / "__init__.py"
    nodes: list[ast.stmt] = _tree(file).body
    for part in parts:
        found = [node for node in nodes if part in _defined(node)]
        if not found:
            return True
        nodes = found[0].body if isinstance(found[0], ast.ClassDef) else []
    return False


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return {node.name}
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    if isinstance(node, ast.Assign):
        return {target.id for target in node.targets if isinstance(target, ast.Name)}
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return {node.target.id}
    return set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_in_the_code(page: Path) -> None:
    text = page.read_text()
    assert not [name for name in NAME.findall(text) if name != A_FILE_OF_THE_STATE and _missing(name)]
    assert not [file for file in FILE.findall(text) if not (ROOT / file).exists()]


def test_the_index_of_decisions_has_the_title_of_each() -> None:
    folder = ROOT / "docs" / "adr"
    index = (folder / "README.md").read_text()
    for page in sorted(folder.glob("0*.md")):
        number, title = page.read_text().split("\n", 1)[0].removeprefix("# ").split(". ", 1)
        assert f"| {number} | [{title}]({page.name}) |" in index
