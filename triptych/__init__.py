"""Disaggregated serving of diffusion models (encode, denoise, decode), as supervised actors.

In a checkout the packages in here are links to the folders at the top level. `import triptych` imports neither torch
nor an HTTP client; a name is imported when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from triptych.actors.errors import TopologyError
    from triptych.actors.topology import Topology, load_topology
    from triptych.api.client import ClientError
    from triptych.api.launch import launch

_MODULES: Final = {
    "ClientError": "api.client",
    "Topology": "actors.topology",
    "TopologyError": "actors.errors",
    "launch": "api.launch",
    "load_topology": "actors.topology",
}
__all__ = ["ClientError", "Topology", "TopologyError", "launch", "load_topology"]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"triptych.{_MODULES[name]}"), name)
