"""The first process of a host: run by path as `init.py SETTINGS`, with SETTINGS a JSON object.

It hides the folders through which processes of one machine meet, says "mounted", reads from stdin the address that its
interface gets, says "up", and ends with its stdin; the kernel then ends all processes of the host. The kernel reaps the
orphans that it inherits: it ignores SIGCHLD, without which a process that has died would look alive to its peers.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

_MS_RDONLY = 1
_MS_REMOUNT = 32
_MS_BIND = 4096
_KEPT_FLAGS = 0x1 | 0x2 | 0x4 | 0x8 | 0x400 | 0x800 | 0x200000
"""Of `statvfs`, which has the numbers of `mount`: an unprivileged user may not take them off a mount."""

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Set the host up and wait."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = json.loads(sys.argv[1])
    seen = {folder: os.open(folder, os.O_PATH) for folder in settings["shared"]}
    disk = os.open(settings["disk"], os.O_PATH)
    for folder in filter(os.path.isdir, settings["hidden"]):
        _mount("tmpfs", folder, "tmpfs", 0, "mode=1777")
    for folder, descriptor in seen.items():
        _bind(descriptor, folder, read_only=True)
    _bind(disk, settings["mounted_at"], read_only=False)
    socket.sethostname(settings["name"])
    print("mounted", flush=True)
    address = sys.stdin.readline().strip()
    if not address:  # whoever made this host has ended
        return
    commands = f"addr add {address} dev eth0\nlink set eth0 up\nlink set lo up\n"
    subprocess.run(["ip", "-batch", "-"], input=commands, text=True, check=True)  # noqa: S607 - where it is differs
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("up", flush=True)
    sys.stdin.read()


def _bind(descriptor: int, folder: str, *, read_only: bool) -> None:
    """Mount a folder, which may be hidden by now, at a path."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    _mount(f"/proc/self/fd/{descriptor}", folder, "", _MS_BIND, "")
    if read_only:
        kept = os.statvfs(folder).f_flag & _KEPT_FLAGS
        _mount("", folder, "", _MS_BIND | _MS_REMOUNT | _MS_RDONLY | kept, "")
    os.close(descriptor)


def _mount(source: str, target: str, kind: str, flags: int, data: str) -> None:
    if _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


if __name__ == "__main__":
    main()
