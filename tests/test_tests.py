"""The tests run what they define."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def test_no_test_has_a_body_that_it_does_not_run() -> None:
    files = Path(__file__).parent.rglob("test_*.py")
    assert not [f"{file.name}: {name}" for file in files for name in unused_bodies(ast.parse(file.read_text()))]


def test_a_body_that_is_not_run_is_found() -> None:
    source = "def test_a():\n  def body(): ...\n  async def other(): ...\n  run(body)"
    assert list(unused_bodies(ast.parse(source))) == ["test_a.other"]


def unused_bodies(module: ast.Module) -> Iterator[str]:
    """Yield the functions within a test that the rest of it does not name."""
    for test in ast.walk(module):
        if isinstance(test, FUNCTIONS) and test.name.startswith("test_"):
            for body in test.body:
                others = (node for line in test.body if line is not body for node in ast.walk(line))
                if isinstance(body, FUNCTIONS) and body.name not in {n.id for n in others if isinstance(n, ast.Name)}:
                    yield f"{test.name}.{body.name}"
