"""The faults, one entry each in `FAULTS`: the victims, whether they have to be replaced, and how it is injected."""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations, permutations
from pathlib import Path
from typing import Final

import zmq

from triptych.actors import AddressBook, Topology
from triptych.actors.runtime.system_messages import ChildReport
from triptych.bus import HEARTBEATS_LOST, parse_address
from triptych.engines.backends import BACKENDS
from triptych.tools.chaos.clock import Clock
from triptych.tools.chaos.target import Target
from triptych.tools.hosts import NetworkFault, resume
from triptych.tools.hosts.cluster import HostsCluster

PAUSE_PAST_TIMEOUT_S: Final = 2.0
"""Seconds by which a pause of the whole system is longer than the heartbeat timeout."""
STALL_SHARE: Final = 0.5
"""Length of a stall of one process, as a share of the heartbeat timeout."""
FULL_S: Final = 3.0
BUSY_S: Final = 4.0
BUSY_PROCESSES: Final = 4
HOUR_S: Final = 3600
SYSTEM: Final = "system"
"""The victim of a fault of the whole system."""
OFF_S: Final = 1.0
"""Seconds for which a host is switched off."""
CUT_SHARES: Final = (0.3, 2.0)
"""Length of a cut, as a share of the time after which a silent host is lost: one that nobody notices, and one that
everybody does."""
WEATHER_S: Final = 5.0
"""Seconds for which packets are lost or late."""
LOST_PERCENT: Final = 5
LATE_S: Final = 0.02


@dataclass(slots=True)
class FaultContext:
    """What an injection has access to."""

    cluster: Target
    address_book: AddressBook
    rng: random.Random
    clock: Clock | None
    """None where the clock of the cluster cannot be set."""


Inject = Callable[[FaultContext, ChildReport | None], Awaitable[None]]
"""Injects a fault into a component, or into the whole system (None); returns when it is over."""
InjectIntoHosts = Callable[[FaultContext, HostsCluster, list[str]], Awaitable[None]]
"""The same for the hosts that a victim names, or the network between them."""


async def _nothing(_: FaultContext, __: ChildReport | None) -> None:
    """No-op."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault: injected at times of a run or, with `rates`, into transfers throughout the run."""

    victims: Callable[[Topology], list[str]] = lambda _: []
    """Names of the components that it may hit; a name that occurs twice is hit twice as often."""
    inject: Inject = _nothing
    into_hosts: InjectIntoHosts | None = None
    """Set in place of `inject` where the victim is a host, "a", two of them, "a-b", or the way between them, "a>b"."""
    lethal: bool = False
    """Whether the victim's process has to be replaced."""
    silent: bool = False
    """Whether the victim of a lethal one ends only when its heartbeats are missed: how long that takes is not counted
    among the recoveries."""
    alone: bool = False
    """Whether a fault of the whole system waits for those of single components, and they for it."""
    ends_supervisors: bool = False
    """Whether the supervisors of the hosts that it hits are replaced, so that the restarts of all there count anew."""
    hinders_starts: bool = False
    """Whether a victim of another fault may need more than one start while it lasts."""
    why_unsupported: Callable[[str, Path], str] = lambda _, __: ""
    """Says why it cannot be injected on this machine with a transfer engine and state folder; "" if it can."""
    rates: str = ""
    """Fault rates of transfers, as `engines.transfer.FaultRates` reads them."""
    transfer_keys: Mapping[str, object] = field(default_factory=dict)
    """Keys of `[transfer]` that a run with it needs."""


def _roles(topology: Topology) -> list[str]:
    """Name the roles, denoisers three times: requests spend most of their time there."""
    often = {"pool": 0, "head": 0, "api": 0, "denoiser": 3}
    return [c.name for c in topology.components for _ in range(often.get(c.kind, 1))]


def _kind(kind: str) -> Callable[[Topology], list[str]]:
    return lambda topology: [c.name for c in topology.components if c.kind == kind]


def _all(topology: Topology) -> list[str]:
    return [c.name for c in topology.components]


def _system(_: Topology) -> list[str]:
    return [SYSTEM]


def _hosts(topology: Topology) -> list[str]:
    return [host.name for host in topology.hosts]


def _pairs(topology: Topology) -> list[str]:
    return [f"{one}-{other}" for one, other in combinations(_hosts(topology), 2)]


def _ways(topology: Topology) -> list[str]:
    return [f"{sender}>{receiver}" for sender, receiver in permutations(_hosts(topology), 2)]


def hosts_of_victim(victim: str) -> list[str]:
    """Return the hosts that the victim of a fault into hosts names; pure."""
    return re.split("[->]", victim)


def components_of_victim(topology: Topology, fault: str, victim: str) -> list[str]:
    """Return the components that a fault hits, in the order of the topology; pure.

    Those of a host that is switched off, and those that a fault of the network may part from the head.
    """
    if FAULTS[fault].into_hosts is None:
        return [victim] if victim != SYSTEM else [c.name for c in topology.components]
    hosts = set(hosts_of_victim(victim))
    if topology.head_host in hosts and len(hosts) == 1 and not FAULTS[fault].ends_supervisors:
        hosts.update(_hosts(topology))
    return [c.name for c in topology.components if c.host in hosts]


def _send(number: signal.Signals) -> Inject:
    async def inject(context: FaultContext, victim: ChildReport | None) -> None:
        os.kill(_pid(context, victim), number)

    return inject


async def _stall(context: FaultContext, victim: ChildReport | None) -> None:
    """Stop a process for less than the heartbeat timeout."""
    with _suspended([_pid(context, victim)]):
        await asyncio.sleep(STALL_SHARE * context.cluster.topology.supervision.heartbeat_timeout_s)


async def _pause(context: FaultContext, _: ChildReport | None) -> None:
    """Stop every process for longer than the heartbeat timeout, as a suspended machine does."""
    with _suspended(context.cluster.process_ids()):
        await asyncio.sleep(context.cluster.topology.supervision.heartbeat_timeout_s + PAUSE_PAST_TIMEOUT_S)


async def _step_clock(context: FaultContext, _: ChildReport | None) -> None:
    if context.clock is not None:
        context.clock.step(context.rng.choice((-HOUR_S, HOUR_S)))


async def _fill_disk(context: FaultContext, _: ChildReport | None) -> None:
    """Fill the disk of the state folder for a while."""
    ballast = context.cluster.topology.state_dir / "ballast"
    try:
        await asyncio.to_thread(_take_space, ballast)
        await asyncio.sleep(FULL_S)
    finally:
        ballast.unlink(missing_ok=True)


async def _load_cpu(_: FaultContext, __: ChildReport | None) -> None:
    """Load the CPU with other processes for a while."""
    spin = f"import time\nend = time.monotonic() + {BUSY_S}\nwhile time.monotonic() < end: pass"
    others = [await asyncio.create_subprocess_exec(sys.executable, "-c", spin) for _ in range(BUSY_PROCESSES)]
    await asyncio.gather(*(other.wait() for other in others))


async def _send_garbage_to(context: FaultContext, victim: ChildReport | None) -> None:
    """Send bytes that are no message to a mailbox and to the HTTP port."""
    if victim is not None:
        await asyncio.to_thread(_send_garbage, context, victim.name)


def _for_a_while(begin: Callable[[HostsCluster, list[str]], NetworkFault], seconds: float = 0.0) -> InjectIntoHosts:
    """Return what begins a fault of the network, and heals it after some time: by default that of a cut."""

    async def inject(context: FaultContext, cluster: HostsCluster, hosts: list[str]) -> None:
        length_s = seconds or context.rng.choice(CUT_SHARES) * HEARTBEATS_LOST * cluster.topology.bus_heartbeat_s
        fault = await asyncio.to_thread(begin, cluster, hosts)
        try:
            await asyncio.sleep(length_s)
        finally:
            await asyncio.to_thread(fault.heal)

    return inject


async def _switch_off(_: FaultContext, cluster: HostsCluster, hosts: list[str]) -> None:
    """Switch a host off and on again."""
    await asyncio.to_thread(cluster.kill_host, hosts[0])
    await asyncio.sleep(OFF_S)
    await asyncio.to_thread(cluster.restart_host, hosts[0])


async def _flap(_: FaultContext, cluster: HostsCluster, hosts: list[str]) -> None:
    await asyncio.to_thread(cluster.hosts.flap, hosts[0])


FAULTS: Final[dict[str, Fault]] = {
    "kill": Fault(_roles, _send(signal.SIGKILL), lethal=True),
    "stop": Fault(_roles, _send(signal.SIGSTOP), lethal=True, silent=True),
    "term": Fault(_roles, _send(signal.SIGTERM), lethal=True),
    "head": Fault(_kind("head"), _send(signal.SIGKILL), lethal=True),
    "api": Fault(_kind("api"), _send(signal.SIGKILL), lethal=True),
    "pool": Fault(_kind("pool"), _send(signal.SIGKILL), lethal=True),
    "poolstop": Fault(_kind("pool"), _send(signal.SIGSTOP), lethal=True, silent=True),
    "stall": Fault(_all, _stall),
    "pause": Fault(_system, _pause, alone=True),
    "clock": Fault(_system, _step_clock, why_unsupported=lambda _, __: Clock.why_unsupported()),
    "full": Fault(_system, _fill_disk, hinders_starts=True, why_unsupported=lambda _, state: _why_no_small_disk(state)),
    "busy": Fault(_system, _load_cpu),
    "garbage": Fault(_all, _send_garbage_to),
    "host": Fault(_hosts, into_hosts=_switch_off, ends_supervisors=True),
    "isolate": Fault(_hosts, into_hosts=_for_a_while(lambda cluster, hosts: cluster.hosts.isolate(hosts[0]))),
    "cut": Fault(_pairs, into_hosts=_for_a_while(lambda cluster, hosts: cluster.hosts.partition(*hosts))),
    "oneway": Fault(_ways, into_hosts=_for_a_while(lambda cluster, hosts: cluster.hosts.one_way(*hosts))),
    "flap": Fault(_hosts, into_hosts=_flap),
    "loss": Fault(
        _hosts, into_hosts=_for_a_while(lambda cluster, hosts: cluster.hosts.lose(LOST_PERCENT, hosts[0]), WEATHER_S)
    ),
    "slow": Fault(
        _hosts, into_hosts=_for_a_while(lambda cluster, hosts: cluster.hosts.delay(hosts[0], LATE_S, LATE_S), WEATHER_S)
    ),
    # Bytes change or are missing.
    "transfer": Fault(rates="flip:0.02,short:0.02"),
    # They come seconds after the receiver has given them up: early, since one that is held up holds up those behind it.
    "late": Fault(
        rates="delay:0.05:3",
        transfer_keys={"pull_timeout_s": 2.0},
        why_unsupported=lambda engine, _: _why_nothing_is_late(engine),
    ),
}
"""Every fault by name; a new fault is one entry."""


def why_unsupported(faults: Iterable[str], engine: str, state: Path) -> dict[str, str]:
    """Say by name why faults cannot be injected here; those that can be are left out."""
    problems = {name: FAULTS[name].why_unsupported(engine, state) for name in faults}
    return {name: problem for name, problem in problems.items() if problem}


def transfer_rates(faults: Iterable[str]) -> str:
    """Return the fault rates of transfers in a run with these faults, as `engines.transfer.FaultRates` reads them."""
    return ",".join(FAULTS[name].rates for name in faults if FAULTS[name].rates)


def transfer_keys(faults: Iterable[str]) -> dict[str, object]:
    """Return the keys of `[transfer]` that a run with these faults needs."""
    return {key: value for name in faults for key, value in FAULTS[name].transfer_keys.items()}


@contextmanager
def small_disk(folder: Path, nbytes: int = 512 << 20) -> Iterator[None]:
    """Mount a file system of `nbytes` bytes at `folder` for the block; no-op where this user may not."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={nbytes},mode=0700", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and _succeeds(mount)
    try:
        yield
    finally:
        if mounted:
            _succeeds(["umount", "--lazy", str(folder)])


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, check=False, capture_output=True).returncode == 0  # noqa: S603 - our own command


def _pid(context: FaultContext, victim: ChildReport | None) -> int:
    if victim is None:
        raise ValueError("this fault needs a victim process")
    return context.cluster.process_id(victim)


@contextmanager
def _suspended(pids: list[int]) -> Iterator[None]:
    held = []
    try:
        for pid in pids:
            held += [pid] if _send_signal(pid, signal.SIGSTOP) else []
        yield
    finally:
        for pid in held:
            resume(pid)


def _send_signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # another fault has ended it
        return False
    return True


def _take_space(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(ballast.parent).free)
            while file.write(bytes(4096)):
                pass
        except OSError:  # it is full, as it should be
            return


def _why_nothing_is_late(engine: str) -> str:
    shared = BACKENDS[engine].shared_memory
    return f"nothing is late where memory is shared, and the topology has engine {engine}" if shared else ""


def _why_no_small_disk(state: Path) -> str:
    return "" if state.is_mount() else "only root can put a small disk at the state folder"


def _send_garbage(context: FaultContext, name: str) -> None:
    with zmq.Context() as sockets, sockets.socket(zmq.DEALER) as dealer:
        dealer.linger = 200
        address, options = context.address_book.address(name), context.address_book.socket_options
        if keys := options.curve:  # from within: from without nothing reaches a mailbox over tcp
            host = options.host_at(parse_address(address))
            dealer.curve_publickey, dealer.curve_secretkey, dealer.curve_serverkey = (
                keys.public,
                keys.secret,
                host.public,
            )
        dealer.connect(address)
        for _ in range(20):
            dealer.send_multipart([context.rng.randbytes(context.rng.randrange(1, 200)) for _ in range(2)])
    try:
        with context.cluster.connect_to_api() as raw:
            raw.sendall(context.rng.randbytes(300) + b"\r\n\r\n")
    except OSError:  # the API may be down or stopped by another fault
        return
