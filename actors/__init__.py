"""The actor runtime: actors, processes, supervision, and the topology that says which there are.

`import actors` does not import torch; `launch` and what it needs are imported when they are first used.
"""

from typing import TYPE_CHECKING

from triptych.actors.actor import Actor
from triptych.actors.addresses import AddressBook
from triptych.actors.errors import ActorCrashed, StartDelayed, StartFailure, TopologyError
from triptych.actors.later import Later
from triptych.actors.topology import Component, Model, Topology, load_topology

if TYPE_CHECKING:
    from triptych.actors.cluster import launch

__all__ = [
    "Actor",
    "ActorCrashed",
    "AddressBook",
    "Component",
    "Later",
    "Model",
    "StartDelayed",
    "StartFailure",
    "Topology",
    "TopologyError",
    "launch",
    "load_topology",
]


def __getattr__(name: str) -> object:
    if name == "launch":  # it needs an HTTP client, which no actor does
        from triptych.actors import cluster

        return cluster.launch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
