"""The address book: from the name of an actor to where its mailbox is."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Final

from triptych.actors.errors import UnknownNameError
from triptych.actors.runtime.bus_keys import bus_options, this_host
from triptych.bus import SocketOptions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from triptych.actors.topology import Topology

SUPERVISOR: Final = "supervisor"
CHILDREN: Final = ".children"
"""Ends the name of the actor that the children of a host's supervisor report to, within the host."""


class AddressBook:
    """The addresses of actors, which follow from the topology alone.

    `extra` adds addresses and overrides those of the topology; with `topology=None` there are no others. `host` is the
    `[[hosts]]` entry of this process, by default `$TRIPTYCH_HOST`, or else the head's.
    """

    def __init__(self, topology: Topology | None, extra: Mapping[str, str] | None = None, *, host: str = "") -> None:
        self._topology = topology
        self._host = host
        self._run_dir: Path | None = topology.run_dir if topology else None
        self._addresses = {c.name: c.address for c in topology.components} if topology else {}
        self._bind = {c.name: c.bind for c in topology.components if c.bind} if topology else {}
        self._host_supervisors: tuple[str, ...] = ()
        if topology is not None and len(topology.hosts) > 1:
            for section in topology.hosts:
                name = supervisor_of(section.name)
                self._addresses[name] = topology.supervisor_address(section)
                self._addresses[name + CHILDREN] = f"ipc://{topology.run_dir}/{name}"
                self._bind[name] = topology.supervisor_bind(section)
                self._host_supervisors += (name,)
        self._addresses.update(extra or {})

    def address(self, name: str) -> str:
        """Return the address of a component, of a supervisor, or of an actor within a component ("x.transfer").

        Raises `UnknownNameError`, a `KeyError` with a sentence, for an unknown name.
        """
        known = self._addresses.get(name)
        if known is not None:
            return known
        if "." in name:  # an actor of this process: all of them share one context
            return f"inproc://{name}"
        if self._run_dir is not None and _is_supervisor(name):
            return f"ipc://{self._run_dir}/{name}"
        raise UnknownNameError(f"no actor is called {name!r}; known are {', '.join(sorted(self._addresses))}")

    def bind_address(self, name: str) -> str:
        """Return where the mailbox of an actor listens: its address, or what its host has in its place."""
        return self._bind.get(name) or self.address(name)

    @cached_property
    def socket_options(self) -> SocketOptions:
        """What every mailbox and outbox of this process opens its sockets with: over tcp, the keys of the bus.

        Raises `StartError` when the keys cannot be read, `UnknownNameError` for a host that the topology does not have.
        """
        if self._topology is None:
            return SocketOptions()
        return bus_options(self._topology, this_host(self._topology, self._host))

    def component_of(self, sender: str) -> str:
        """Return the component or supervisor that an actor belongs to; "" for one that the topology does not know.

        All actors of a process are of one generation.
        """
        component = sender.partition(".")[0]
        known = component in self._addresses or component.removeprefix(f"{SUPERVISOR}-") in self._addresses
        return component if known or component == SUPERVISOR else ""

    def supervisors(self) -> tuple[str, ...]:
        """Return the names of the supervisors of all hosts, and of others with a socket in the run folder.

        They run or have been left behind by a crash.
        """
        sockets: set[str] = set()
        if self._run_dir is not None and self._run_dir.is_dir():
            sockets = {path.name for path in self._run_dir.iterdir() if _is_supervisor(path.name) and path.is_socket()}
        return (*self._host_supervisors, *sorted(sockets.difference(self._host_supervisors)))


def supervisor_of(name: str) -> str:
    """Return the name of the supervisor of one of several hosts, or of a component on its own, as with `up --only`."""
    return f"{SUPERVISOR}-{name}"


def _is_supervisor(name: str) -> bool:
    return name == SUPERVISOR or name.startswith(f"{SUPERVISOR}-")
