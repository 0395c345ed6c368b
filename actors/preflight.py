"""What a topology needs of this machine, looked at before anything is started."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Final

from actors.errors import TopologyError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from actors.topology import Component, Topology

_DEVICES: Final = ("nvidia[0-9]*", "nvidiactl", "kfd", "dxg")  # NVIDIA, AMD, and either of them under Windows


def preflight(topology: Topology, components: Sequence[Component], *, file: str = "") -> None:
    """Raise `TopologyError` for the first thing that this machine lacks to run `components`.

    `file` is what the error calls the topology, by default its absolute path. Nothing large is imported, so what
    only torch can tell is left to the roles themselves.
    """
    file = file or str(topology.path)
    kinds = {component.kind for component in components}
    if kinds - {"api"}:
        _check_model(topology, file)
    if "pool" in kinds and topology.engine == "mooncake" and importlib.util.find_spec("mooncake") is None:
        fix = 'install it with pip install "triptych[mooncake]", or use engine = "shm"'
        raise TopologyError(file, '[transfer] engine = "mooncake"', "needs the mooncake engine, which is missing", fix)
    for component in components:
        if component.device.startswith("cuda") and not has_accelerator():
            fix = 'use device = "cpu", or run it on a machine with an accelerator'
            problem = f'= "{component.device}" for {component.name}, but this machine shows no such device'
            raise TopologyError(file, "[[roles]] device", problem, fix)


def has_accelerator(devices: Path = Path("/dev")) -> bool:
    """Whether a driver has put an accelerator into `devices`."""
    return any(True for pattern in _DEVICES for _ in devices.glob(pattern))


def _check_model(topology: Topology, file: str) -> None:
    folder = topology.model_path
    if folder.is_dir():
        return
    problem = "is a file" if folder.exists() else "does not exist"
    fix = "give the folder of a model, relative to the topology file or absolute"
    raise TopologyError(file, f'[model] path = "{topology.model.path}"', f"{problem} ({folder})", fix)
