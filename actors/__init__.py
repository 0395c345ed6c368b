"""The actor runtime, supervision, and the topology that says which processes there are. Imports no torch."""

from triptych.actors.errors import ActorCrashedError, StartDelayedError, StartError, TopologyError
from triptych.actors.runtime.actor import Actor, Incarnation
from triptych.actors.runtime.address_book import AddressBook
from triptych.actors.runtime.handlers import DeferredReply
from triptych.actors.topology import Component, Model, Topology, load_topology

__all__ = [
    "Actor",
    "ActorCrashedError",
    "AddressBook",
    "Component",
    "DeferredReply",
    "Incarnation",
    "Model",
    "StartDelayedError",
    "StartError",
    "Topology",
    "TopologyError",
    "load_topology",
]
