"""Disaggregated serving of diffusion models (encode, denoise, decode), as supervised actors.

In a checkout the packages in here are links to the folders at the top level. `import triptych` imports neither torch
nor an HTTP client; a name is imported when it is first used.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triptych.actors import Topology, TopologyError, launch, load_topology

__all__ = ["Topology", "TopologyError", "launch", "load_topology"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from triptych import actors

    return getattr(actors, name)
