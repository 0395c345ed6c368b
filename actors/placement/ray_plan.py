"""What Ray is asked for, and what its answers mean; all pure, and without Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from triptych.actors.errors import TopologyError
from triptych.actors.topology import gpu_count
from triptych.actors.topology.paths import fingerprint
from triptych.actors.topology.placed_hosts import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from triptych.actors.topology import Topology

NAMESPACE: Final = "triptych"
SYSTEM_CONFIG: Final = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 300,
    "health_check_failure_threshold": 3,
    "worker_niceness": 0,
}
"""Settings of a Ray cluster with which the loss of a node is seen within two seconds (by default, within a quarter of a
minute), and with which what its workers start has the priority of other processes."""
_PIN: Final = 0.001
"""Share of the resource `node:ADDRESS`, of which each node has 1, that puts a bundle on that node."""
_THREADS: Final = "OMP_NUM_THREADS"

Bundle = dict[str, float]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent of one host is made with; the same after each restart."""

    file: str
    """The topology file, absolute, and the same on every node."""
    host: str
    """The entry that it runs."""
    head_agent: str
    """Name of the agent of the head's host, whose clock counts; "" for that one itself."""
    hosts: tuple[str, ...]
    """Names of all entries, in the order of the bundles."""
    moving: tuple[str, ...]
    """Those whose address Ray decides."""
    public_keys: dict[str, str]
    """Of all entries."""
    secret_key: str
    """Of this one."""
    log_level: str = ""
    """As of `triptych up --log-level`."""


def group_name(topology: Topology) -> str:
    """Return the name of the placement group of a topology, which starts the names of its agents."""
    return f"triptych-{topology.path.stem}-{fingerprint(topology.path)}"


def agent_name(group: str, host: str) -> str:
    """Return the name of the agent of a host."""
    return f"{group}.{host}"


def check_address(address: str) -> None:
    """Raise `ValueError`, with a sentence, for an address that no driver can use."""
    if address != "auto" and ("://" in address or not address.rpartition(":")[2].isdigit()):
        raise ValueError(f'--ray "{address}" is not the address of a Ray cluster: write HOST:PORT of its head, or auto')


def pins(topology: Topology, addresses: Mapping[str, str], driver: str) -> dict[str, str]:
    """Return the address of the node of each host that cannot be anywhere.

    These are the entries with an address, and that of the head, whose journal lies on one disk: without an address it
    is on the node where `triptych up --ray` runs.

    Args:
        topology: As it is written.
        addresses: Address of each entry that has one, names resolved.
        driver: Address of the node of this process.
    """
    pinned = dict(addresses)
    pinned.setdefault(topology.head_host, driver)
    return pinned


def bundle(topology: Topology, host: str, pin: str = "") -> Bundle:
    """Return the resources of a host: a GPU for each that its roles count, a CPU for each role instance on the CPU.

    `device = "cuda"` counts from 0 within what Ray assigns, and so does `cuda:N`.
    """
    roles = [component for component in topology.on_host(host) if component.slots]
    gpus = gpu_count(roles)
    cpus = sum(not component.on_gpu for component in roles)
    wanted = {"GPU": float(gpus), "CPU": float(max(cpus, 0 if gpus else 1))}
    if pin:
        wanted[f"node:{pin}"] = _PIN
    return {name: amount for name, amount in wanted.items() if amount}


def check_pins(file: str, pinned: Mapping[str, str], nodes: Sequence[Mapping[str, Any]]) -> None:
    """Raise `TopologyError` if a host is to be on a node that the cluster does not have."""
    known = [str(node["NodeManagerAddress"]) for node in nodes if node["Alive"]]
    for host, address in pinned.items():
        if address not in known:
            problem = f'= "{address}" is not a node of the Ray cluster, which has {", ".join(sorted(known))}'
            fix = "correct it, or leave it out, so that Ray chooses a node"
            raise TopologyError(file, f'[[hosts]] "{host}" address', problem, fix)


def placed_addresses(
    hosts: Sequence[str], bundles_to_node_id: Mapping[int, str], nodes: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """Return the address of the node of each host that has one, from what Ray says about its group and its nodes."""
    addresses = {str(node["NodeID"]): str(node["NodeManagerAddress"]) for node in nodes if node["Alive"]}
    found = {host: addresses.get(bundles_to_node_id.get(index, "")) for index, host in enumerate(hosts)}
    return {host: address for host, address in found.items() if address}


def why_not_placed(bundles: Mapping[str, Bundle], nodes: Sequence[Mapping[str, Any]]) -> str:
    """Return what the hosts that wait need, and what the nodes of the cluster have in all, as a sentence."""
    wanted = ", ".join(f"{host} needs {_amounts(amounts)}" for host, amounts in bundles.items())
    alive = [node for node in nodes if node["Alive"]]
    have = ", ".join(f"{node['NodeManagerAddress']} has {_amounts(node['Resources'])} in all" for node in alive)
    return f"Ray has no room: {wanted}; {have or 'there is no node'}"


def _amounts(resources: Mapping[str, float]) -> str:
    shown = [f"{resources[name]:g} {name}" for name in ("GPU", "CPU") if resources.get(name)]
    where = [f"the node {name.removeprefix('node:')}" for name, amount in resources.items() if amount == _PIN]
    return " and ".join(shown + where) or "no GPU and no CPU"


def slow_settings(config: Mapping[str, object]) -> str:
    """Return a warning, with the fix, if the loss of a node may go unseen for long with these settings; else ""."""
    worse = [key for key, value in SYSTEM_CONFIG.items() if not _at_most(config.get(key), value)]
    if not worse:
        return ""
    written = msgspec.json.encode(SYSTEM_CONFIG).decode()
    return (
        f"this Ray cluster has not set {', '.join(worse)} low, so that node losses may be seen late, or roles may "
        f"have a low priority: start its head with ray start --head --system-config='{written}'"
    )


def _at_most(value: object, wanted: int) -> bool:
    return isinstance(value, int | float) and value <= wanted


def command(python: str, order: Order) -> list[str]:
    """Return the command line that runs a host's part."""
    level = ["--log-level", order.log_level] if order.log_level else []
    run = [python, "-P", "-m", "triptych.actors.command", "up", order.file]
    return [*run, "--host", order.host, "--until-eof", *level]


def environment(own: Mapping[str, str], raylet: Mapping[str, str], placed_hosts: str) -> dict[str, str]:
    """Return the variables of what an agent starts: its own, without the bound on threads that Ray sets in each worker.

    Args:
        own: Variables of the agent.
        raylet: Variables that Ray itself was started with: what the user has set there stays.
        placed_hosts: Path of the file of the placed hosts.
    """
    kept = {name: value for name, value in own.items() if name != _THREADS}
    if _THREADS in raylet:
        kept[_THREADS] = raylet[_THREADS]
    return {**kept, VARIABLE: placed_hosts}
