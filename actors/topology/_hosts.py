"""The hosts of a topology: which of them runs what, how its components are reached, and what cannot work. Pure."""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from triptych.actors.errors import TopologyError
from triptych.actors.topology._parser import did_you_mean
from triptych.actors.topology.sections import (
    STAGES,
    HostSection,
    RoleSection,
    Sections,
    TransferSection,
    parse_size,
)
from triptych.bus import is_public_key
from triptych.engines.backends import AUTO, BACKENDS, resolve_engine

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

BETWEEN_HOSTS: Final = "mooncake"
"""The transfer backend that `[transfer] engine = "auto"` stands for where roles run on several hosts."""
FIRST_TRANSFER_PORT: Final = 21_000
TRANSFER_PORTS: Final = 16
LEAST_TRANSFER_PORTS: Final = 4
"""A pool listens on two, and the two of the one before it may stay taken for a minute."""
LEAST_HOST_POOL_BYTES: Final = 12_288
"""Three pages: one for each zone that the pool of a host may have."""
HOST_ADDRESS: Final = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|[0-9a-fA-F:]+")


@lru_cache(maxsize=64)  # each request is asked for its Host
def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach `host`."""
    return host == "localhost" or (is_ip(host) and ipaddress.ip_address(host).is_loopback)


def is_ip(host: str) -> bool:
    """Return whether `host` is an address and no name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_network(text: str) -> bool:
    """Return whether `text` is an address, or a network such as 10.0.0.0/8."""
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def tcp_address(host: str, port: int) -> str:
    """Return the address of a mailbox on a host; IPv6 addresses get brackets."""
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def bind_host(host: HostSection) -> str:
    """Return where the mailboxes of a host listen; ZMQ does not resolve names there."""
    if host.bind or is_ip(host.address):
        return host.bind or host.address
    return "127.0.0.1" if is_loopback(host.address) else "*"


def head_host(sections: Sections) -> str:
    """Return the name of the host of the head and the API; "" without `[[hosts]]`."""
    return sections.head.host or _only_host(sections)


def hosts_of(sections: Sections, role: RoleSection) -> tuple[str, ...]:
    """Return the names of the hosts that each run `count` instances of a role; ("",) without `[[hosts]]`."""
    return role.hosts or (role.host or _only_host(sections),)


def pool_hosts(sections: Sections) -> tuple[str, ...]:
    """Return the names of the hosts that have a pool, in the order of `[[hosts]]`."""
    used = {
        name
        for model in sections.models
        for role in model.roles
        if role.kind in STAGES
        for name in hosts_of(sections, role)
    }
    return tuple(host.name for host in sections.hosts if host.name in used)


def choose_engine(transfer: TransferSection, pool_hosts: Collection[str]) -> str:
    """Return the name of the transfer backend, "auto" resolved by how many hosts have pools."""
    if transfer.engine == AUTO and len(pool_hosts) > 1:
        return BETWEEN_HOSTS
    return resolve_engine(transfer.engine)


def pool_name(sections: Sections, role: RoleSection, host: str) -> str:
    """Return the name of the pool that a role's instances on `host` use; "" if they need none."""
    if role.kind not in STAGES:
        return ""
    if host:
        return f"pool-{host}"
    return (
        "pool"
        if BACKENDS[choose_engine(sections.transfer, pool_hosts(sections))].shared_memory
        else f"pool-{role.kind}"
    )


def pool_size(host: HostSection | None, transfer: TransferSection) -> str:
    """Return the size of the pool of a host, as it is written."""
    return (host.pool_size if host is not None else "") or transfer.pool_size


def transfer_ports(hosts: Sequence[HostSection], name: str) -> tuple[int, int]:
    """Return the first and the last port on which the pool of a host listens for others."""
    index = [host.name for host in hosts].index(name)
    if written := hosts[index].transfer_ports:
        first, _, last = written.partition("-")
        return int(first), int(last)
    begin = FIRST_TRANSFER_PORT + index * TRANSFER_PORTS
    return begin, begin + TRANSFER_PORTS - 1


def check_hosts(file: str, sections: Sections) -> None:
    """Raise `TopologyError` for the first host, or reference to a host, that cannot work."""
    _check_entries(file, sections.hosts)
    for host in sections.hosts:
        _check_host(file, host)
    _check_loopback(file, sections.hosts)
    _check_references(file, sections)
    if sections.hosts and sections.transfer.hostname != TransferSection().hostname:
        problem = f'= "{sections.transfer.hostname}" is one address for several hosts'
        fix = "give each [[hosts]] entry its own with transfer_address"
        raise TopologyError(file, "[transfer] hostname", problem, fix)
    several = pool_hosts(sections)
    engine = choose_engine(sections.transfer, pool_hosts(sections))
    if len(several) > 1 and BACKENDS[engine].shared_memory:
        problem = f"shares memory, which the roles on {_listed(several)} cannot"
        fix = f'write engine = "{BETWEEN_HOSTS}", or run all roles on one host'
        raise TopologyError(file, f'[transfer] engine = "{engine}"', problem, fix)


def _only_host(sections: Sections) -> str:
    return sections.hosts[0].name if sections.hosts else ""


def _check_entries(file: str, hosts: tuple[HostSection, ...]) -> None:
    for key in ("name", "address", "public_key"):
        counted = Counter(value for host in hosts if (value := getattr(host, key)))
        for value, count in counted.items():
            if count > 1:
                fix = f"give each a {key.replace('_', ' ')} of its own"
                raise TopologyError(file, "[[hosts]]", f'use the {key.replace("_", " ")} "{value}" {count} times', fix)


def _check_public_key(file: str, where: str, host: HostSection) -> None:
    if host.public_key and not is_public_key(host.public_key):
        problem = f'= "{host.public_key}" is not a public key'
        fix = f"run `triptych keys FILE --host {host.name}` on that host, and copy the line that it prints"
        raise TopologyError(file, f"{where} public_key", problem, fix)


def _check_host(file: str, host: HostSection) -> None:
    where = f'[[hosts]] "{host.name}"'
    for key in ("address", "transfer_address"):
        value = getattr(host, key)
        if key == "address" and not value:
            fix = "write it, or let Ray choose a node with `triptych up FILE --ray ADDRESS`"
            raise TopologyError(file, where, "has no address", fix)
        if value and not HOST_ADDRESS.fullmatch(value):
            fix = 'write an address or a name alone, as in "10.0.0.1"'
            raise TopologyError(file, f"{where} {key}", f'= "{value}" is not an address', fix)
    _check_public_key(file, where, host)
    if host.pool_size:
        try:
            nbytes = parse_size(host.pool_size)
        except ValueError:
            problem, fix = f'= "{host.pool_size}" is not a size', 'write it as in "256MiB" or "1.5GiB"'
            raise TopologyError(file, f"{where} pool_size", problem, fix) from None
        if nbytes < LEAST_HOST_POOL_BYTES:
            problem = f'= "{host.pool_size}" is less than {LEAST_HOST_POOL_BYTES} bytes'
            raise TopologyError(file, f"{where} pool_size", problem, 'make it larger, as in "256MiB"')
    if host.transfer_ports:
        first, last = transfer_ports([host], host.name)
        if not 0 < first <= last <= 65535:
            problem, fix = f'= "{host.transfer_ports}" is not a range of ports', 'write it as in "21000-21015"'
            raise TopologyError(file, f"{where} transfer_ports", problem, fix)
        if last - first + 1 < LEAST_TRANSFER_PORTS:
            problem = f'= "{host.transfer_ports}" is too narrow: a pool takes two, and others when it is restarted'
            raise TopologyError(file, f"{where} transfer_ports", problem, 'give it 16, as in "21000-21015"')


def _check_loopback(file: str, hosts: tuple[HostSection, ...]) -> None:
    reachable = [host for host in hosts if not is_loopback(host.address)]
    for host in hosts:
        if reachable and is_loopback(host.address):
            problem = f'= "{host.address}" is an address that {reachable[0].name} cannot reach'
            fix = "give the address that the other hosts reach it by"
            raise TopologyError(file, f'[[hosts]] "{host.name}" address', problem, fix)
        if reachable and is_loopback(host.transfer_address):
            problem = f'= "{host.transfer_address}" is an address that {reachable[0].name} cannot reach'
            fix = "give the address that the other hosts' pools reach it by, or leave it out"
            raise TopologyError(file, f'[[hosts]] "{host.name}" transfer_address', problem, fix)


def _check_references(file: str, sections: Sections) -> None:
    names = [host.name for host in sections.hosts]
    _check_name(file, "[head] host", sections.head.host, names)
    if len(names) > 1 and not sections.head.host:
        fix = f'write host = "{names[0]}" there, or the name of another host'
        raise TopologyError(file, "[head]", f"lacks the key host, with {len(names)} [[hosts]]", fix)
    for model in sections.models:
        table = "[[roles]]" if len(sections.models) == 1 else f'[[models.roles]] of "{model.name}"'
        for role in model.roles:
            where = f'{table} kind = "{role.kind}"'
            if role.host and role.hosts:
                fix = "write all of them in hosts, or one as host"
                raise TopologyError(file, where, "has both host and hosts", fix)
            for name in (role.host, *role.hosts):
                _check_name(file, f"{where} {'hosts' if role.hosts else 'host'}", name, names)
            if len(set(role.hosts)) < len(role.hosts):
                name = Counter(role.hosts).most_common(1)[0][0]
                raise TopologyError(file, f"{where} hosts", f'have "{name}" twice', "write each once, and raise count")
            if len(names) > 1 and not (role.host or role.hosts):
                fix = f'write host = "{names[0]}" there, or hosts = [...] for several'
                raise TopologyError(file, where, f"lacks the key host, with {len(names)} [[hosts]]", fix)


def _check_name(file: str, where: str, name: str, known: list[str]) -> None:
    if name and not known:
        fix = "add a [[hosts]] with its name and address, or leave it out"
        raise TopologyError(file, where, f'= "{name}", but there are no [[hosts]]', fix)
    if name and name not in known:
        raise TopologyError(file, where, f'= "{name}" is not a host', did_you_mean(name, known))


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last
