"""Whole clusters for a benchmark: a model made for it, a topology in a folder of its own, and quiet on stdout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from triptych.actors.supervision import module_command


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """What clusters print while they start and stop must not come between the rows."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def make_model(folder: Path, *options: str) -> None:
    """Run `tools.make_model`, in a process of its own: its memory and its libraries are not the benchmark's."""
    command = (*module_command("triptych.tools.make_model"), str(folder), *options)
    subprocess.run(command, check=True)  # noqa: S603 - our own command


def write_topology(
    folder: Path, model: Path, dtype: str, roles: Mapping[str, int], slots: int, **settings: str
) -> Path:
    """Make `folder`, and in it a topology of so many instances of each kind of role; returns the file.

    `settings` are further keys of its `[model]`.
    """
    folder.mkdir()
    file = folder / "topology.toml"
    keys = {"path": model, "dtype": dtype, **settings}
    lines = ["[model]", *(f'{key} = "{value}"' for key, value in keys.items()), "[state]", f'path = "{folder}/state"']
    for kind, count in roles.items():
        lines += ["[[roles]]", f'kind = "{kind}"', f"count = {count}", f"slots = {slots}"]
    file.write_text("\n".join(lines) + "\n")
    return file
