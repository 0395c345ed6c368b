"""Checks before Mooncake is imported: one wheel, its libraries, its environment, and a device for RDMA."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Mapping, MutableMapping
from importlib import metadata
from pathlib import Path
from typing import Any

from triptych.engines.transfer.backend import TransferSetupError

WHEELS = {
    "mooncake-transfer-engine-non-cuda": "triptych[mooncake]",
    "mooncake-transfer-engine": "triptych[mooncake-cu12]",
    "mooncake-transfer-engine-cuda13": "triptych[mooncake-cu13]",
}
INSTALL = (
    'Install exactly one of "triptych[mooncake]" (hosts without an NVIDIA driver), "triptych[mooncake-cu12]" '
    '(CUDA 12) and "triptych[mooncake-cu13]" (CUDA 13): their wheels overwrite each other.'
)
INFINIBAND = Path("/sys/class/infiniband")

_FORCED = {"tcp": ("MC_FORCE_TCP", "MC_FORCE_HCA"), "rdma": ("MC_FORCE_HCA", "MC_FORCE_TCP")}
_PORTS = ("MC_MIN_RPC_PORT", "MC_MAX_RPC_PORT")
_LISTEN = "0A"  # TCP_LISTEN, as the kernel writes it
_PROGRESS = "MC_TCP_PROGRESS_TIMEOUT_SEC"
_TRANSFER = "MC_TRANSFER_TIMEOUT"
_DEFAULTS = {
    # With cached descriptors, a peer that restarts on its old port is never reached again (hazard 4). Fetching the
    # descriptor each time costs 0.3 ms a pull.
    "MC_DISABLE_METACACHE": "1",
    # Late writes of a pull that was given up end when no byte has moved for this long (hazard 3).
    _PROGRESS: "5",
    "MC_TCP_STATUS_TIMEOUT_SEC": "5",
    _TRANSFER: "10",
    "MC_HANDSHAKE_CONNECT_TIMEOUT": "2",
    # The default of 64 KiB costs a quarter of the throughput.
    "MC_TCP_SLICE_SIZE": "1048576",
    "MC_LOG_LEVEL": "ERROR",
}


def environment(protocol: str, current: Mapping[str, str], ports: tuple[int, int] | None = None) -> dict[str, str]:
    """Return the environment variables to set for a protocol; those that are set already are kept. Pure.

    Args:
        protocol: "tcp" or "rdma".
        current: The environment.
        ports: The first and the last port to listen on, for the handshake and for the data of TCP.

    Raises:
        TransferSetupError: The protocol is unknown, or variables contradict it or each other.
    """
    if protocol not in _FORCED:
        raise TransferSetupError(f'transfer.protocol must be "tcp" or "rdma", not "{protocol}"')
    # Without one of these variables, the presence of a device decides the transport (hazard 2).
    forced, contradicted = _FORCED[protocol]
    if contradicted in current:
        raise TransferSetupError(f'{contradicted} is set, but transfer.protocol is "{protocol}": unset one')
    wanted = {forced: "1", **_DEFAULTS}
    if ports is not None:
        wanted |= dict(zip(_PORTS, map(str, ports), strict=True))
    settings = {name: current.get(name, value) for name, value in wanted.items()}
    if not 0 < _seconds(settings, _PROGRESS) < _seconds(settings, _TRANSFER):
        raise TransferSetupError(
            f"{_PROGRESS} must be a number of seconds below {_TRANSFER}: change one in the environment"
        )
    return settings


def check_devices(protocol: str, ib_device: str, found: Iterable[str]) -> None:
    """Raise TransferSetupError if RDMA is wanted and its devices are missing.

    Args:
        protocol: "tcp" or "rdma".
        ib_device: The wanted devices, comma-separated; "" for all.
        found: The devices of this host.
    """
    if protocol != "rdma":
        return
    names = sorted(found)
    missing = sorted(set(filter(None, ib_device.split(","))) - set(names))
    if not names:
        raise TransferSetupError(
            'transfer.protocol is "rdma", but this host has no device under /sys/class/infiniband: use "tcp"'
        )
    if missing:
        raise TransferSetupError(f"transfer.ib_device names {', '.join(missing)}; this host has {', '.join(names)}")


def infiniband_devices(root: Path = INFINIBAND) -> list[str]:
    """Return the names of the RDMA devices of this host."""
    return sorted(path.name for path in root.iterdir()) if root.is_dir() else []


def rdma_activity(root: Path = INFINIBAND) -> int:
    """Return how many RDMA reads and writes the ports of this host have served; it proves that RDMA is used.

    Soft-RoCE does not count those: of its devices, the packets that they have sent are returned.
    """
    return sum(
        int(counter.read_text())
        for name in ("rx_read_requests", "rx_write_requests", "sent_pkts")
        for counter in root.glob(f"*/ports/*/hw_counters/{name}")
    )


def listening_ports(proc: Path = Path("/proc/self")) -> list[int]:
    """Return the TCP ports that this process listens on."""
    held = {_target(link) for link in (proc / "fd").iterdir()}
    tables = [table for table in (proc / "net" / "tcp", proc / "net" / "tcp6") if table.exists()]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return sorted(
        {int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == _LISTEN and f"socket:[{row[9]}]" in held}
    )


def check_wheels(installed: Mapping[str, str]) -> str:
    """Return the name and version of the installed wheel. Pure.

    Args:
        installed: The versions of installed distributions by name.

    Raises:
        TransferSetupError: No wheel is installed, or several, of which the last has overwritten the others.
    """
    ours = [f"{name} {installed[name]}" for name in WHEELS if name in installed]
    if not ours:
        raise TransferSetupError(f"Mooncake is not installed. {INSTALL}")
    if len(ours) > 1:
        raise TransferSetupError(f"{' and '.join(ours)} have overwritten each other: uninstall all. {INSTALL}")
    return ours[0]


def explain(error: ImportError) -> str:
    """Say what is missing for the import of Mooncake."""
    text = str(error)
    if "libibverbs" in text:
        return "Mooncake needs libibverbs.so.1, also for TCP: apt-get install libibverbs1"
    if "libcuda.so" in text:
        return f"The installed Mooncake wheel needs an NVIDIA driver, and this host has none. {INSTALL}"
    if "libcudart" in text:
        return f"The installed Mooncake wheel is for another version of CUDA ({text}). {INSTALL}"
    return f"Mooncake cannot be imported: {text}. {INSTALL}"


def import_engine(settings: Mapping[str, str], environ: MutableMapping[str, str] = os.environ) -> Any:
    """Set environment variables and import `mooncake.engine`, which reads them once.

    Raises:
        TransferSetupError: It cannot be imported, or was imported before with other settings.
    """
    late = sorted(name for name, value in settings.items() if environ.get(name) != value)
    if late and "mooncake.engine" in sys.modules:
        raise TransferSetupError(f"Mooncake was imported before these were set: {', '.join(late)}")
    environ.update(settings)
    try:
        return importlib.import_module("mooncake.engine")
    except ImportError as error:
        raise TransferSetupError(explain(error)) from error


def installed_wheels() -> dict[str, str]:
    """Return the versions of the installed wheels by name."""
    found = {}
    for name in WHEELS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _seconds(settings: Mapping[str, str], name: str) -> int:
    text = settings[name]
    if not text.isdecimal():
        raise TransferSetupError(f"{name} must be a whole number of seconds, not {text!r}")
    return int(text)


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except FileNotFoundError:  # closed since it was listed
        return ""
