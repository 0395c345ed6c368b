"""The transfer backends: one table that the topology, the checks and the processes read. Imports nothing large.

To add a backend, write its module in `engines/transfer/` and add its line here; then
`tests/engines/transfer/test_every_backend.py` tests it as it does the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

AUTO: Final = "auto"
"""The `[transfer] engine` that stands for the default backend."""
DEFAULT: Final = "shm"


@dataclass(frozen=True)
class BackendSpec:
    """What the rest of the system must know about a backend before it is imported.

    Attributes:
        opener: "MODULE:FUNCTION" that opens it, called as `engines.transfer.open_backend` says.
        shared_memory: Whether all roles map one pool. If not, each kind of role has a pool of its own and bytes are
            copied between them; a copy can arrive after its timeout.
        package: The Python package that it needs, as it is imported; "" for none.
        install: What `pip install` takes to install that package.
        fork_safe: Whether a process that has imported `package` may fork.
        is_open_to_network: Whether whoever reaches this host can read and write the memory of its pools.
    """

    opener: str
    shared_memory: bool
    package: str = ""
    install: str = ""
    fork_safe: bool = True
    is_open_to_network: bool = False


BACKENDS: Final[Mapping[str, BackendSpec]] = {
    "shm": BackendSpec("triptych.engines.transfer.shm:open_shm", shared_memory=True),
    "mooncake": BackendSpec(
        "triptych.engines.transfer.mooncake:open_mooncake",
        shared_memory=False,
        package="mooncake",
        install="triptych[mooncake]",
        fork_safe=False,
        is_open_to_network=True,
    ),
}
"""Backends by the name that `[transfer] engine` has for them."""


def resolve_engine(engine: str) -> str:
    """Return the name of the backend that `[transfer] engine` stands for."""
    return DEFAULT if engine == AUTO else engine
