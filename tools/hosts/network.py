"""The switch between hosts, and the faults that it can have."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from threading import RLock
from types import TracebackType
from typing import Final, Self

_WIRE: Final = Path(__file__).with_name("wire.py")
_BRIDGE: Final = "br0"


def search_path() -> str:
    """Return where programs are looked for: users who are not root often lack the folders of `ip` and `nft`."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _environment() -> dict[str, str]:
    return {**os.environ, "PATH": search_path()}


class NetworkFault:
    """A fault that is there from its making until it is healed, or until the end of a `with` block."""

    def __init__(self, heal: Callable[[], object]) -> None:
        self._heal: Callable[[], object] | None = heal

    def heal(self) -> None:
        """End the fault; a second call changes nothing."""
        heal, self._heal = self._heal, None
        if heal:
            heal()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.heal()


class Switch:
    """A bridge in a network namespace of its own; faults may overlap. Every method may be called from any thread.

    Args:
        enter: the command line that runs what is appended to it in the namespace of the switch; () in that namespace.
        address: of the switch itself, with the length of the network's prefix.
    """

    def __init__(self, enter: Sequence[str], address: str) -> None:
        self._enter = tuple(enter)
        self._lock = RLock()
        self._rules: list[tuple[str, ...]] = []
        self._faults: list[NetworkFault] = []
        self._wires: dict[str, subprocess.Popen[str]] = {}
        self.ip(
            f"link add name {_BRIDGE} type bridge mcast_snooping 0",
            f"link set dev {_BRIDGE} addrgenmode none up",
            f"addr add {address} dev {_BRIDGE}",
            "link set lo up",
        )

    def ip(self, *commands: str) -> None:
        """Run commands of `ip`, in one process."""
        self._run("ip", "-batch", "-", text="".join(f"{command}\n" for command in commands))

    def connect(self, host: str, number: int, pid: int) -> None:
        """Give the namespace of a process an interface `eth0`, at the port called `host`."""
        # A host that was ended and is made again keeps its address at the link, which the others remember.
        peer = f"name eth0 address 02:00:00:00:00:{number:02x} netns {pid}"
        self.ip(
            f"link add name {host} type veth peer {peer}",
            f"link set dev {host} addrgenmode none",
            f"link set dev {host} master {_BRIDGE} up",
        )

    def disconnect(self, host: str) -> None:
        """Take away the port of a host."""
        self.ip(f"link del dev {host}")

    def link_down(self, host: str) -> NetworkFault:
        """Pull the cable of a host, which sees it."""
        self.ip(f"link set dev {host} down")
        return self._began(lambda: self.ip(f"link set dev {host} up"))

    def drop(self, *matches: str) -> NetworkFault:
        """Drop the packets that match, as nftables writes it, without a word to the sender."""
        rules = tuple(f"{match} drop" for match in matches)
        with self._lock:
            self._write_rules([*self._rules, rules])

        def heal() -> None:
            with self._lock:
                left = list(self._rules)
                left.remove(rules)
                self._write_rules(left)

        return self._began(heal)

    def limit_rate(self, host: str, megabits: float) -> NetworkFault:
        """Let a host receive no more than so many megabits a second."""
        limit = ("tbf", "rate", f"{megabits:g}mbit", "burst", "128kb", "latency", "50ms")
        self._run("tc", "qdisc", "replace", "dev", host, "root", *limit)
        return self._began(lambda: self._run("tc", "qdisc", "del", "dev", host, "root"))

    def delay(self, host: str, seconds: float, jitter_s: float = 0.0) -> NetworkFault:
        """Hold up each packet from and to a host; a host has one such fault at a time."""
        ends = f"{host}-w0", f"{host}-w1"
        self.ip(
            f"link add name {ends[0]} type veth peer name {ends[1]}",
            *(f"link set dev {end} addrgenmode none up" for end in ends),
            f"link set dev {host} nomaster",
            f"link set dev {ends[1]} master {_BRIDGE}",
        )
        command = [*self._enter, sys.executable, "-I", "-S", str(_WIRE), host, ends[0], f"{seconds}", f"{jitter_s}"]
        self._wires[host] = start_holder(command, "up")

        def heal() -> None:
            end_holder(self._wires.pop(host))
            self.ip(f"link del dev {ends[0]}", f"link set dev {host} master {_BRIDGE}")

        return self._began(heal)

    def flap(self, host: str, times: int, down_s: float, up_s: float) -> None:
        """Pull the cable of a host and put it back, again and again; returns at the end."""
        for _ in range(times):
            with self.link_down(host):
                time.sleep(down_s)
            time.sleep(up_s)

    def heal(self) -> None:
        """End every fault."""
        for fault in tuple(self._faults):
            fault.heal()

    def close(self) -> None:
        """End it."""
        for wire in self._wires.values():
            end_holder(wire)
        self.ip(f"link del dev {_BRIDGE}")

    def _began(self, heal: Callable[[], object]) -> NetworkFault:
        def ended() -> None:
            self._faults.remove(fault)
            heal()

        fault = NetworkFault(ended)
        self._faults.append(fault)
        return fault

    def _write_rules(self, groups: list[tuple[str, ...]]) -> None:
        rules = [rule for group in groups for rule in group]
        chain = ["chain forward {", "type filter hook forward priority 0", *rules, "}"]
        # Three commands of one transaction: the old table, if there is one, gives way to the new one at once.
        table = ["table bridge faults", "delete table bridge faults", "table bridge faults {", *chain, "}"]
        self._run("nft", "-f", "-", text="\n".join(table) + "\n")
        self._rules = groups

    def _run(self, *command: str, text: str = "") -> None:
        result = subprocess.run(  # noqa: S603 - our own command
            [*self._enter, *command], input=text, capture_output=True, text=True, check=False, env=_environment()
        )
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {result.stderr.strip()}\n{text}")


def open_holder(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start a process that lives as long as our end of its stdin.

    So nothing of it is left when this process ends, however it ends.
    """
    return subprocess.Popen(  # noqa: S603 - our own command
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=_environment(),
    )


def start_holder(command: Sequence[str], word: str) -> subprocess.Popen[str]:
    """Start such a process and wait until it says a word; raises RuntimeError when it says something else."""
    with ExitStack() as stack:
        holder = open_holder(command)
        stack.callback(end_holder, holder)
        wait_for(holder, word)
        stack.pop_all()
    return holder


def wait_for(holder: subprocess.Popen[str], word: str) -> None:
    """Wait until a holder says a word; raises RuntimeError when it ends or says something else."""
    said = holder.stdout.readline().strip() if holder.stdout else ""
    if said != word:
        raise RuntimeError(f"{holder.args!r} said {said!r} and not {word!r}")


def tell(holder: subprocess.Popen[str], line: str) -> None:
    """Send a line to a holder."""
    if holder.stdin:
        holder.stdin.write(f"{line}\n")
        holder.stdin.flush()


def end_holder(holder: subprocess.Popen[str]) -> None:
    """End a holder, and what it holds."""
    for stream in (holder.stdin, holder.stdout):
        if stream:
            stream.close()
    try:
        holder.wait(2.0)
    except subprocess.TimeoutExpired:
        holder.kill()
        holder.wait()
