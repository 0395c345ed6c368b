"""The key pair of this host, with which the bus is encrypted over tcp: every process of the host reads it.

A system of one machine has one key, which `triptych up` makes. Between `[[hosts]]` each has its own, and the topology
lists the public halves: `triptych keys` makes a key and prints the line for the list.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from triptych.actors.errors import StartError
from triptych.actors.topology import is_loopback
from triptych.actors.topology.paths import private_dir
from triptych.actors.topology.placed_hosts import current_address, read_placed_hosts
from triptych.bus import CurveKeys, HostKey, SocketOptions

if TYPE_CHECKING:
    from triptych.actors.topology import Topology

HOST_VARIABLE: Final = "TRIPTYCH_HOST"
"""Names the host that a process runs on if it is no component of the topology, such as a command."""
_FILE: Final = "bus.key"


def this_host(topology: Topology, given: str = "") -> str:
    """Return the name of this process's `[[hosts]]` entry: the given one, else `$TRIPTYCH_HOST`, else the head's.

    It is "" without `[[hosts]]`. Raises `UnknownNameError` for one that the topology does not have.
    """
    if not topology.hosts:
        return ""
    return topology.host(given or os.environ.get(HOST_VARIABLE, "") or topology.head_host).name


def bus_options(topology: Topology, host: str) -> SocketOptions:
    """Return what the mailboxes and outboxes of a process on `host` open their sockets with.

    Raises `StartError` when the key of this host cannot be read, or is not the one that is listed.
    """
    if topology.bus.transport != "tcp":
        return SocketOptions()
    keys, listed = read_bus_keys(topology, host), host_keys(topology)
    _check_listed(topology, host, keys, listed)
    locate = current_address if read_placed_hosts() else None
    return SocketOptions(curve=keys, hosts=listed, heartbeat_s=topology.bus_heartbeat_s, locate=locate)


def host_keys(topology: Topology) -> tuple[HostKey, ...]:
    """Return the public keys of the hosts; () for a system of one machine, which has one key.

    Raises `StartError` for a host that lists none.
    """
    if not lists_keys(topology):
        return ()
    for host in topology.hosts:
        if not host.public_key:
            raise StartError(
                f"host {host.name} has no public_key in {topology.path}: {fix_unlisted(topology, host.name)}"
            )
    return tuple(HostKey(host.name, host.address, host.public_key.encode()) for host in topology.hosts)


def lists_keys(topology: Topology) -> bool:
    """Return whether each host has a key of its own, which the topology lists."""
    if any(host.public_key for host in topology.hosts):
        return True
    return len(topology.hosts) > 1 and not all(is_loopback(host.address) for host in topology.hosts)


def fix_unlisted(topology: Topology, host: str) -> str:
    """Return what to do about a host whose key is not listed."""
    command = f"triptych keys {topology.path.name} --host {host}"
    return f"run `{command}` on it, and give its [[hosts]] the line that this prints, on all hosts"


def bus_keys_path(topology: Topology, host: str) -> Path:
    """Return the absolute path of the secret key of `host`."""
    placed = read_placed_hosts()
    written = topology.bus.keys if placed is None else placed.keys
    if not written:
        return topology.state_dir / _FILE
    return topology.path.parent / Path(written.replace("{host}", host)).expanduser()


def make_bus_keys(topology: Topology, host: str = "") -> None:
    """Make the key of a system of one machine, unless it is there, and check it; a listed key is only checked.

    Raises `StartError` when it cannot be written or used, `PermissionError` as `private_dir` does.
    """
    if topology.bus.transport != "tcp":
        return
    if not lists_keys(topology):
        if not topology.bus.keys:
            private_dir(topology.state_dir.resolve())
        file = bus_keys_path(topology, host)
        if not file.exists():
            write_new_key(file)
    bus_options(topology, host)


def read_bus_keys(topology: Topology, host: str) -> CurveKeys:
    """Return the key pair of `host`; raises `StartError` when there is none, others can read it, or it is no key."""
    file = bus_keys_path(topology, host)
    made_by = f"`triptych keys {topology.path.name}`" if lists_keys(topology) else "`triptych up`"
    try:
        return read_key(file)
    except FileNotFoundError as error:
        fix = f"{made_by} makes it, and every process of this host needs the same one"
        raise StartError(f"{file} cannot be read ({error.strerror}): {fix}") from error


def read_key(file: Path) -> CurveKeys:
    """Return the key pair of a file; raises `FileNotFoundError`, `StartError` when it cannot be used."""
    try:
        with file.open("rb") as opened:
            status, text = os.fstat(opened.fileno()), opened.read(1024)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StartError(f"{file} cannot be read: {error.strerror}") from error
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        fix = "make another (`triptych keys FILE --force`), since they may have read it"
        raise StartError(f"{file} is open to other users: {fix}")
    try:
        return CurveKeys.of(text.decode().strip())
    except ValueError:
        raise StartError(f"{file} holds no key: remove it, and make another with `triptych keys FILE`") from None


def write_new_key(file: Path, *, replace: bool = False) -> None:
    """Write a new secret key, for this user alone, whole or not at all; one that is there stays unless `replace`.

    Raises `StartError` when it cannot be written.
    """
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, fresh = tempfile.mkstemp(prefix=f"{file.name}.", dir=file.parent)  # 0600
        try:
            with os.fdopen(descriptor, "w") as written:
                written.write(CurveKeys.new().secret.decode())
                written.flush()
                os.fsync(written.fileno())
            if replace:
                Path(fresh).replace(file)
            else:
                with contextlib.suppress(FileExistsError):  # another process was first: its key is the one
                    os.link(fresh, file)
        finally:
            Path(fresh).unlink(missing_ok=True)
    except OSError as error:
        raise StartError(f"{file} cannot be written: {error.strerror}") from error


def _check_listed(topology: Topology, host: str, keys: CurveKeys, listed: tuple[HostKey, ...]) -> None:
    owner = next((each.name for each in listed if each.public == keys.public), "")
    if not listed or owner == host:
        return
    file = bus_keys_path(topology, host)
    whose = f"is the key of host {owner}" if owner else "is a key that no host lists"
    raise StartError(f"{file} {whose}, and this is {host}: {fix_unlisted(topology, host)}")
