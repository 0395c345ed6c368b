"""Start clusters for a benchmark: make its model, write its topology, keep stdout free of their output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from triptych.actors.supervision import module_command
from triptych.engines.parameters.serving_config import SERVING_CONFIG_NAME


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send what clusters print to stderr, so that it does not come between the rows."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def make_model(folder: Path, *options: str) -> None:
    """Run `tools.make_model` in another process, so that its memory is not measured with the benchmark's."""
    command = (*module_command("triptych.tools.make_model"), str(folder), *options)
    subprocess.run(command, check=True)  # noqa: S603 - our own command


def allow_steps(model: Path, most: int) -> None:
    """Let requests ask the model in a folder for up to so many steps."""
    file = model / SERVING_CONFIG_NAME
    settings = json.loads(file.read_text())
    settings["ranges"]["num_inference_steps"] = [1, most]
    file.write_text(json.dumps(settings))


def write_topology(
    folder: Path, model: Path, dtype: str, roles: Mapping[str, int], slots: int, **settings: str
) -> Path:
    """Make `folder` and write a topology into it, with so many instances of each kind of role; return the file.

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
