"""The hosts of a topology as an engine such as Ray has placed them: what their `[[hosts]]` entries leave open.

The engine's agent on each node writes them to a file and starts `triptych up FILE --host NAME` with
`TRIPTYCH_PLACED_HOSTS` set to its path. Every process of the host reads it at its start, and again at each try to
connect, so that it finds a host that has moved.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from triptych.actors.errors import TopologyError

if TYPE_CHECKING:
    from triptych.actors.topology.sections import HostSection, Sections

VARIABLE: Final = "TRIPTYCH_PLACED_HOSTS"


class PlacedHost(msgspec.Struct, frozen=True, kw_only=True):
    """Where one `[[hosts]]` entry runs now."""

    address: str = ""
    """Address of its node; "" = that of its entry, which stays where it is."""
    public_key: str = ""
    """Public half of the key pair that was made for it, Z85 text."""


class PlacedHosts(msgspec.Struct, frozen=True, kw_only=True):
    """All hosts of a topology, as one of them sees them."""

    hosts: dict[str, PlacedHost]
    """By the name of the entry."""
    keys: str = ""
    """Path of the file with this host's secret key."""
    generations: str = ""
    """Folder for the generations of this host's components: what an earlier system on this node counted is nothing
    to compare with."""
    clock_ahead_ms: int = 0
    """By how much the clock of the head's host is ahead of this one. Generations follow the former everywhere, so that
    those of a host never go back when it moves to a node whose clock is behind."""


def read_placed_hosts() -> PlacedHosts | None:
    """Return the placed hosts of this process, None if no engine has placed it; raises `TopologyError`."""
    path = os.environ.get(VARIABLE, "")
    if not path:
        return None
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=PlacedHosts)
    except OSError as error:
        raise TopologyError(path, "", f"cannot be read ({error.strerror})", f"unset {VARIABLE}") from error
    except msgspec.DecodeError as error:
        raise TopologyError(path, "", f"holds no placed hosts ({error})", f"unset {VARIABLE}") from error


def write_placed_hosts(file: Path, placed: PlacedHosts) -> None:
    """Write the file, whole or not at all; raises `OSError`."""
    fresh = file.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(placed))
    fresh.rename(file)


def current_address(host: str) -> str:
    """Return where the host called `host` is now; `host` itself if it is an address, or a name that others resolve."""
    placed = read_placed_hosts()
    entry = placed.hosts.get(host) if placed else None
    return (entry.address if entry else "") or host


def with_placed_hosts(sections: Sections, placed: PlacedHosts) -> Sections:
    """Return the sections of a file with what the placed hosts add to its `[[hosts]]`. Pure.

    The address of an entry that has none is its name, which each connection looks up anew; it listens on the address of
    its node.
    """
    hosts = tuple(_with_placed(host, placed.hosts.get(host.name, PlacedHost())) for host in sections.hosts)
    return msgspec.structs.replace(sections, hosts=hosts)


def _with_placed(host: HostSection, placed: PlacedHost) -> HostSection:
    if placed.public_key:
        host = msgspec.structs.replace(host, public_key=placed.public_key)
    if host.address:
        return host
    return msgspec.structs.replace(
        host,
        address=host.name,
        bind=host.bind or placed.address,
        transfer_address=host.transfer_address or placed.address,
    )
