"""Memory and children of other processes, from /proc."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple


class ProcessMemory(NamedTuple):
    """The memory of a process, in MiB."""

    rss: float
    """All of its pages, those included that other processes have mapped as well."""
    pss: float
    """Its share: of a page that n processes have mapped, 1/n. The sum over processes counts each page once."""
    uss: float
    """Pages that no other process has mapped: what its end would free."""
    peak_rss: float
    """The most that `rss` has been since the process was started."""


def process_memory(pid: int) -> ProcessMemory:
    """Measure a process of this user; raises FileNotFoundError or ProcessLookupError when there is none."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return parse(rollup, Path(f"/proc/{pid}/status").read_text())


def parse(rollup: str, status: str) -> ProcessMemory:
    """Read `/proc/PID/smaps_rollup` and `/proc/PID/status`; pure. Raises KeyError for a kernel thread's."""
    fields = [line.partition(":") for line in (rollup + "\n" + status).splitlines()]
    sizes = {name: int(value.split()[0]) / 1024 for name, _, value in fields if value.endswith(" kB")}
    own = sizes["Private_Clean"] + sizes["Private_Dirty"]
    return ProcessMemory(rss=sizes["Rss"], pss=sizes["Pss"], uss=own, peak_rss=sizes["VmHWM"])


def children_of(parent: int) -> list[int]:
    """Return the ids of the children of a process, with zombies."""
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]  # noqa: PTH208
    return [pid for pid in pids if stat(pid)[1:2] == [str(parent)]]


def stat(pid: int) -> list[str]:
    """Return the fields of `/proc/PID/stat` from the state and the parent on; empty ones if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ["", ""]
