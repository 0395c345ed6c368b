"""Hosts on one machine: namespaces for network, mounts, processes, System V IPC and the host's name."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import triptych
from triptych.tools.hosts.network import (
    NetworkFault,
    Switch,
    end_holder,
    open_holder,
    search_path,
    start_holder,
    tell,
    wait_for,
)

DISK: Final = "/var/tmp/disk"  # noqa: S108 - of the host alone
"""Folder of a host that no other host sees, and that is still there when the host is started again."""
_PACKAGES: Final = {
    "ip": "iproute2",
    "tc": "iproute2",
    "nft": "nftables",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
_HIDDEN: Final = ("/run", "/tmp", "/var/tmp", "/dev/shm")  # noqa: S108
_OWN: Final = {
    "HOME": f"{DISK}/home",
    "TMPDIR": "/tmp",  # noqa: S108
    "XDG_RUNTIME_DIR": "/run",
    "XDG_CACHE_HOME": f"{DISK}/cache",
    "XDG_STATE_HOME": f"{DISK}/state",
}
"""Environment of the processes of a host."""
_INSIDE: Final = "TRIPTYCH_HOSTS_SWITCH"
"""Set where this process is in the namespace of the switch."""
_OBSERVER: Final = 254
"""Last number of the address that this process has there."""
_INIT: Final = Path(__file__).with_name("init.py")
_SPACES: Final = ("--net", "--mount", "--uts", "--pid", "--ipc")
_NO_NAMESPACES: Final = """\
this kernel lets neither this user nor a user namespace make hosts ({}). Type one of:
  sudo make ...                                                     # as root
  sudo sysctl -w kernel.apparmor_restrict_unprivileged_userns=0     # Ubuntu
  sudo sysctl -w kernel.unprivileged_userns_clone=1                 # an old Debian
  docker run --privileged ...                                       # in a container"""


class HostsError(Exception):
    """Hosts cannot be made on this machine; the message says what to type."""


@functools.cache
def why_unsupported() -> str:
    """Say why hosts cannot be made here, and what to type; "" if they can."""
    if sys.platform != "linux":
        return "hosts are made of namespaces, which only Linux has"
    missing = {tool: package for tool, package in _PACKAGES.items() if not shutil.which(tool, path=search_path())}
    if missing:
        packages = " ".join(sorted(set(missing.values())))
        return f"{', '.join(missing)} not found. Type:  sudo apt-get install {packages}"
    _, problem = _user_namespace()
    return _NO_NAMESPACES.format(problem) if problem else ""


@functools.cache
def _user_namespace() -> tuple[tuple[str, ...], str]:
    """Return what `unshare` needs to make namespaces for this user, and why it cannot in any way."""
    problem = ""
    for options in ((), ("-U", "-r")):
        command = ["unshare", *options, "-n", "-m", "-u", "-i", "-p", "-f", "--mount-proc", "true"]
        tried = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
        if not tried.returncode:
            return options, ""
        problem = tried.stderr.strip()
    return (), problem


def enter_switch() -> None:
    """Run this program again in a network namespace that becomes the switch of the hosts it makes.

    So it reaches all of them by their addresses, and no fault between them is in its way. It is for programs, at their
    start: it does not return in the process that calls it first. Raises `HostsError`.
    """
    if os.environ.get(_INSIDE):
        return
    if problem := why_unsupported():
        raise HostsError(problem)
    command = ["unshare", *_user_namespace()[0], "-n", "-m", sys.executable, *sys.orig_argv[1:]]
    environment = {**os.environ, _INSIDE: "1", "PATH": search_path()}
    os.execvpe(command[0], command, environment)  # noqa: S606 - ourselves


def resume(pid: int) -> None:
    """Send SIGCONT to a process, and to the `nsenter` above it if it is on a host, which has stopped itself with it."""
    parent = 0
    with suppress(FileNotFoundError, ProcessLookupError):  # it has been killed meanwhile
        os.kill(pid, signal.SIGCONT)
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    with suppress(FileNotFoundError, ProcessLookupError):
        if parent > 1 and Path(f"/proc/{parent}/comm").read_text().strip() == "nsenter":
            os.kill(parent, signal.SIGCONT)


class HostProcess(subprocess.Popen[str]):
    """A process on a host.

    Signals go to the process itself: what this machine starts is `nsenter`, whose child is on the host.
    """

    def send_signal(self, sig: int) -> None:
        """Send a signal to the process on the host."""
        if self.poll() is not None:
            return
        children = _children(self.pid)
        for pid in children:
            with suppress(ProcessLookupError):  # it ends in this moment
                os.kill(pid, sig)
        if not children or sig == signal.SIGKILL:
            super().send_signal(sig)
        elif sig != signal.SIGSTOP:  # it stops itself when its child stops
            super().send_signal(signal.SIGCONT)


class Hosts:
    """Hosts on one switch, which reach each other and nothing else, for the length of a `with` block.

    Each is a machine to what runs on it: interface `eth0`, loopback, processes, host name, `/run`, `/tmp`, XDG folders
    and a disk at `DISK` are its own. All other files are those of this machine. Nothing is left behind, also when this
    process is killed: each host ends with a pipe from here.

    Args:
        names: of the hosts, at most 8 letters and digits each.
        shared: folders that every host sees under the same path, read-only: models, topologies.
        network: first three numbers of the addresses.
        disks: folder of this machine for the disks of the hosts; by default one that goes with them.
        user_namespace: whether they are made in a user namespace, as for a user who is not root; by default only
            where that is needed.
        environment: further variables of every process.

    Raises:
        HostsError: at the start of the block, where hosts cannot be made.
    """

    def __init__(
        self,
        names: Sequence[str] = ("a", "b", "c"),
        *,
        shared: Iterable[Path] = (),
        network: str = "10.77.0",
        environment: Mapping[str, str] | None = None,
        disks: Path | None = None,
        user_namespace: bool = False,
    ) -> None:
        self.names = tuple(names)
        self._network = network
        self._disks = disks
        self._user_namespace = user_namespace
        self._environment = {"PATH": search_path(), **(environment or {}), **_OWN}
        # The interpreter and this package may lie below a folder that is hidden.
        code = (Path(triptych.__path__[0]).parent, Path(sys.prefix), Path(sys.base_prefix))
        self._shared = [str(path.absolute()) for path in (*code, *shared) if _below_hidden(path)]
        self._stack = ExitStack()
        self._inits: dict[str, subprocess.Popen[str]] = {}
        self._pids: dict[str, int] = {}
        self._processes: list[tuple[str, HostProcess]] = []

    def __enter__(self) -> Self:
        if problem := why_unsupported():
            raise HostsError(problem)
        with ExitStack() as stack:
            own = stack.enter_context(tempfile.TemporaryDirectory(prefix="triptych-hosts-"))
            self._folder = self._disks or Path(own)
            self._user: tuple[str, ...] = ()
            self._enter_switch: tuple[str, ...] = ()
            if not os.environ.get(_INSIDE):
                options = ("-U", "-r") if self._user_namespace else _user_namespace()[0]
                holder = start_holder(["unshare", *options, "-n", "sh", "-c", "echo up; exec cat"], "up")
                stack.callback(end_holder, holder)
                self._user = ("--user", "--preserve-credentials") if options else ()
                self._enter_switch = ("nsenter", "-t", f"{holder.pid}", *self._user, "--net")
            self.switch = Switch(self._enter_switch, f"{self._network}.{_OBSERVER}/24")
            stack.callback(self.switch.close)
            stack.callback(self._end_all)
            self.start(*self.names)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def address(self, host: str) -> str:
        """Return the address by which the others reach a host."""
        return f"{self._network}.{self.names.index(host) + 1}"

    def disk(self, host: str) -> Path:
        """Return the folder of this machine that a host has at `DISK`."""
        return self._folder / host

    def root(self, host: str) -> Path:
        """Return the root of the files of a host that runs, as this machine sees it."""
        return Path(f"/proc/{self._pids[host]}/root")

    def command(self, host: str, *command: str) -> list[str]:
        """Return the command line of this machine that runs a command on a host, in its folder `/`.

        It has the environment of its caller, apart from the folders that are the host's own.
        """
        settings = [f"{name}={value}" for name, value in self._environment.items()]
        spaces = ("-t", f"{self._pids[host]}", *self._user, *_SPACES, "--wdns=/")
        return ["nsenter", *spaces, "env", *settings, *command]

    def popen(self, host: str, *command: str, **options: Any) -> HostProcess:
        """Start a command on a host, with the further arguments of `subprocess.Popen`; it ends with the host."""
        process = HostProcess(self.command(host, *command), **{"text": True, **options})
        self._processes.append((host, process))
        return process

    def run(self, host: str, *command: str) -> str:
        """Run a command on a host and return what it prints; raises `subprocess.CalledProcessError`."""
        command_line = self.command(host, *command)
        return subprocess.run(command_line, check=True, capture_output=True, text=True).stdout  # noqa: S603

    def outer_pids(self, host: str) -> dict[int, int]:
        """Return the processes of a host: what this machine calls each, by what the host calls it."""
        space = _pid_namespace(self._pids[host])
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _pid_namespace(int(entry.name)) == space:
                with suppress(FileNotFoundError, ProcessLookupError):  # it ends in this moment
                    status = (entry / "status").read_text()
                    inner = next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1]
                    found[int(inner)] = int(entry.name)
        return found

    def signal(self, host: str, number: signal.Signals) -> None:
        """Send a signal to all processes of a host but the first; of SIGKILL the kernel tells their peers."""
        subprocess.run(self.command(host, "sh", "-c", f"kill -{int(number)} -1"), check=True)  # noqa: S603
        if number == signal.SIGCONT:
            for name, process in self._processes:
                if name == host and process.poll() is None:  # it stopped itself when its child stopped
                    os.kill(process.pid, number)

    def kill(self, host: str) -> None:
        """Switch a host off, as where the power fails: its peers are told nothing."""
        self.switch.disconnect(host)
        end_holder(self._inits.pop(host))
        del self._pids[host]
        for name, process in self._processes:
            if name == host:
                _reap(process)
        self._processes = [(name, process) for name, process in self._processes if name != host]

    def start(self, *hosts: str) -> None:
        """Start hosts that do not run; what was on their disks is there."""
        user = self._enter_switch if self._user else ()
        for host in hosts:
            self.disk(host).mkdir(exist_ok=True, mode=0o700)
            settings = {
                "name": host,
                "hidden": _HIDDEN,
                "shared": self._shared,
                "disk": str(self.disk(host)),
                "mounted_at": DISK,
            }
            unshare = ("unshare", "-n", "-m", "-u", "-i", "-p", "--kill-child", "--mount-proc")
            python = (sys.executable, "-I", "-S", str(_INIT), json.dumps(settings))
            self._inits[host] = open_holder([*user, *unshare, *python])
        for host in hosts:  # they have started side by side
            init = self._inits[host]
            wait_for(init, "mounted")
            (self._pids[host],) = _children(init.pid)
            self.switch.connect(host, self.names.index(host) + 1, self._pids[host])
            tell(init, f"{self.address(host)}/24")
        for host in hosts:
            wait_for(self._inits[host], "up")

    # Faults of the network: each is there until it is healed, or for the length of a `with` block.

    def link_down(self, host: str) -> NetworkFault:
        """Pull the cable of a host, which sees it."""
        return self.switch.link_down(host)

    def partition(self, one: str, other: str) -> NetworkFault:
        """Lose every packet between two hosts."""
        return self.switch.drop(self._packets(one, other), self._packets(other, one))

    def isolate(self, host: str) -> NetworkFault:
        """Lose every packet between a host and all others."""
        address = self.address(host)
        return self.switch.drop(f"ip saddr {address}", f"ip daddr {address}")

    def one_way(self, sender: str, receiver: str) -> NetworkFault:
        """Lose every packet from one host to another; what comes back arrives."""
        return self.switch.drop(self._packets(sender, receiver))

    def lose(self, percent: int, host: str = "") -> NetworkFault:
        """Lose so many of a hundred packets, fewer than 100, of a host or of all."""
        chance = f"numgen random mod 100 < {percent}"
        if not host:
            return self.switch.drop(chance)
        address = self.address(host)
        return self.switch.drop(f"ip saddr {address} {chance}", f"ip daddr {address} {chance}")

    def limit_rate(self, host: str, megabits: float) -> NetworkFault:
        """Let a host receive no more than so many megabits a second."""
        return self.switch.limit_rate(host, megabits)

    def delay(self, host: str, seconds: float, jitter_s: float = 0.0) -> NetworkFault:
        """Hold up each packet from and to a host; a host has one such fault at a time."""
        return self.switch.delay(host, seconds, jitter_s)

    def flap(self, host: str, times: int = 5, down_s: float = 0.2, up_s: float = 0.2) -> None:
        """Pull the cable of a host and put it back, again and again; returns at the end."""
        self.switch.flap(host, times, down_s, up_s)

    def heal(self) -> None:
        """End every fault of the network."""
        self.switch.heal()

    def _packets(self, sender: str, receiver: str) -> str:
        return f"ip saddr {self.address(sender)} ip daddr {self.address(receiver)}"

    def _end_all(self) -> None:
        for init in self._inits.values():
            end_holder(init)
        for _, process in self._processes:
            _reap(process)


def _reap(process: HostProcess) -> None:
    """Reap a process whose host has ended."""
    process.kill()
    process.wait()


def _below_hidden(path: Path) -> bool:
    return any(path.absolute().is_relative_to(folder) for folder in _HIDDEN)


def _children(pid: int) -> list[int]:
    """Return the children of a process that has one thread; none if it has ended."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def _pid_namespace(pid: int) -> int:
    try:
        return Path(f"/proc/{pid}/ns/pid").stat().st_ino
    except (FileNotFoundError, PermissionError, ProcessLookupError):  # it has ended, or is another user's
        return 0
