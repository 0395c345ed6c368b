"""What a host needs of whoever runs it, such as Kubernetes or Ray: GPUs, and time to stop. Pure."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from triptych.actors.topology._topology import Component, Topology


def gpu_count(components: Iterable[Component]) -> int:
    """Return the GPUs that the components of a host need: as many as the highest number that one of them names.

    `cuda` stands for the GPU of the instance's number, so that two roles of four instances share four.
    """
    needed = 0
    for component in components:
        if component.on_gpu:
            number = component.device.partition(":")[2]
            needed = max(needed, 1 + (int(number) if number else component.index))
    return needed


def stop_bound_s(topology: Topology, host: str | None = None) -> float:
    """Return the seconds that the components of a host may take to stop.

    A supervisor stops them in reverse start order, each within `[supervision] shutdown_s`. Only neighbours of one kind
    stop together.

    Args:
        topology: What runs.
        host: Name of the host, "" without `[[hosts]]`; None for the one that may take longest.
    """
    hosts = {component.host for component in topology.components} if host is None else {host}
    return max(_stops(topology, name) for name in hosts) * topology.supervision.shutdown_s


def _stops(topology: Topology, host: str) -> int:
    """Return how many times the supervisor of a host waits for components to stop."""
    kinds = (component.kind for component in topology.components if component.host == host)
    return sum(1 for _ in itertools.groupby(kinds))
