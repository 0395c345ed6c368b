"""The faults, one entry each in `FAULTS`: the victims, whether they have to be replaced, and how it is injected."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import zmq

from triptych.actors import AddressBook, Topology
from triptych.actors.runtime.system_messages import ChildReport
from triptych.api.launch import Cluster
from triptych.engines.backends import BACKENDS
from triptych.tools.chaos.clock import Clock
from triptych.tools.procfs import children_of

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


@dataclass(slots=True)
class FaultContext:
    """What an injection has access to."""

    cluster: Cluster
    address_book: AddressBook
    rng: random.Random
    clock: Clock | None
    """None where the clock of the cluster cannot be set."""


Inject = Callable[[FaultContext, ChildReport | None], Awaitable[None]]
"""Injects a fault into a component, or into the whole system (None); returns when it is over."""


async def _nothing(_: FaultContext, __: ChildReport | None) -> None:
    """No-op."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault: injected at times of a run or, with `rates`, into transfers throughout the run."""

    victims: Callable[[Topology], list[str]] = lambda _: []
    """Names of the components that it may hit; a name that occurs twice is hit twice as often."""
    inject: Inject = _nothing
    lethal: bool = False
    """Whether the victim's process has to be replaced."""
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


def _send(number: signal.Signals) -> Inject:
    async def inject(_: FaultContext, victim: ChildReport | None) -> None:
        os.kill(_pid(victim), number)

    return inject


async def _stall(context: FaultContext, victim: ChildReport | None) -> None:
    """Stop a process for less than the heartbeat timeout."""
    with _suspended([_pid(victim)]):
        await asyncio.sleep(STALL_SHARE * context.cluster.topology.supervision.heartbeat_timeout_s)


async def _pause(context: FaultContext, _: ChildReport | None) -> None:
    """Stop every process for longer than the heartbeat timeout, as a suspended machine does."""
    supervisor = context.cluster.process.pid
    with _suspended([supervisor, *children_of(supervisor)]):
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


FAULTS: Final[dict[str, Fault]] = {
    "kill": Fault(_roles, _send(signal.SIGKILL), lethal=True),
    "stop": Fault(_roles, _send(signal.SIGSTOP), lethal=True),
    "term": Fault(_roles, _send(signal.SIGTERM), lethal=True),
    "head": Fault(_kind("head"), _send(signal.SIGKILL), lethal=True),
    "api": Fault(_kind("api"), _send(signal.SIGKILL), lethal=True),
    "pool": Fault(_kind("pool"), _send(signal.SIGKILL), lethal=True),
    "poolstop": Fault(_kind("pool"), _send(signal.SIGSTOP), lethal=True),
    "stall": Fault(_all, _stall),
    "pause": Fault(_system, _pause),
    "clock": Fault(_system, _step_clock, why_unsupported=lambda _, __: Clock.why_unsupported()),
    "full": Fault(_system, _fill_disk, why_unsupported=lambda _, state: _why_no_small_disk(state)),
    "busy": Fault(_system, _load_cpu),
    "garbage": Fault(_all, _send_garbage_to),
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


def _pid(victim: ChildReport | None) -> int:
    if victim is None:
        raise ValueError("this fault needs a victim process")
    return victim.pid


@contextmanager
def _suspended(pids: list[int]) -> Iterator[None]:
    held = []
    try:
        for pid in pids:
            held += [pid] if _send_signal(pid, signal.SIGSTOP) else []
        yield
    finally:
        for pid in held:
            _send_signal(pid, signal.SIGCONT)


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
        if (
            keys := context.address_book.socket_options.curve
        ):  # from within: from without nothing reaches a mailbox over tcp
            dealer.curve_publickey, dealer.curve_secretkey, dealer.curve_serverkey = (
                keys.public,
                keys.secret,
                keys.public,
            )
        dealer.connect(context.address_book.address(name))
        for _ in range(20):
            dealer.send_multipart([context.rng.randbytes(context.rng.randrange(1, 200)) for _ in range(2)])
    api = context.cluster.topology.api
    try:
        with socket.create_connection((api.host, api.port), timeout=5) as raw:
            raw.sendall(context.rng.randbytes(300) + b"\r\n\r\n")
    except OSError:  # the API may be down or stopped by another fault
        return
