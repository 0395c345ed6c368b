"""Which systems run on this machine, for commands that are given no topology."""

from __future__ import annotations

from pathlib import Path

import msgspec

from triptych.actors.errors import TopologyError
from triptych.actors.supervision import running_systems
from triptych.actors.topology import Topology, load_topology


def topology_of(file: Path | None) -> Topology:
    """Load a topology, by default that of the one system that runs here; raises `TopologyError`.

    A system that runs has its state where it was started with it, whatever the environment is now.
    """
    running = {owner.topology: Path(owner.state_dir) for owner in running_systems()}
    if file is None and len(running) != 1:
        if running:
            problem, fix = f"is not given, and {len(running)} systems run here", f"name one of {', '.join(running)}"
        else:
            problem, fix = "is not given, and no system runs here", "give the FILE of the system whose logs you want"
        raise TopologyError("--topology", "", problem, fix)
    topology = load_topology(file or Path(next(iter(running))))
    return msgspec.structs.replace(topology, state_dir=running.get(str(topology.path), topology.state_dir))


def actor_names(incomplete: str) -> list[str]:
    """Complete the name of a component of the systems that run here."""
    found: list[str] = []
    for owner in running_systems():
        try:
            found += [component.name for component in load_topology(Path(owner.topology)).components]
        except (TopologyError, OSError):  # a shell wants names, not sentences
            continue
    return [name for name in dict.fromkeys(found) if name.startswith(incomplete)]
