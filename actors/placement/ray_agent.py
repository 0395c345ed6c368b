"""The actor that Ray restarts on another node: it runs one host's part, and follows the addresses of the others."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from triptych.actors.errors import describe
from triptych.actors.placement.placed_process import PlacedProcess
from triptych.actors.placement.ray_plan import NAMESPACE, Order, command, environment, placed_addresses
from triptych.actors.topology.paths import private_dir, run_dir
from triptych.actors.topology.placed_hosts import PlacedHost, PlacedHosts, write_placed_hosts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from triptych.actors.placement.placed_process import Report

_LOOK_EVERY_S: Final = 0.5
_ASK_S: Final = 5.0
_FINAL: Final = (0, 2)


class RayAgent:
    """Runs `triptych up FILE --host NAME` as long as it lives; Ray makes it anew, with the same order, when it dies.

    A new one begins with nothing but the order: so it starts the process itself, and learns from Ray where all hosts
    are.
    """

    def __init__(self, order: bytes) -> None:
        import ray

        self._order = msgspec.json.decode(order, type=Order)
        file = Path(self._order.file)
        # The same after a crash, so that what that left is written over.
        self._folder = private_dir(run_dir(file).with_name(f"{run_dir(file).name}-{self._order.host}"))
        self._asked_at = time.monotonic()
        was_moved = bool(ray.get_runtime_context().was_current_actor_reconstructed)
        raylet = int(os.environ["RAY_RAYLET_PID"])
        self._priority = os.getpriority(os.PRIO_PROCESS, raylet)
        own = environment(os.environ, _environment_of(raylet), str(self._placed_hosts_file))
        # Where it has run before, it may run again, whatever keeps it from that now.
        self._process = PlacedProcess(command(sys.executable, self._order), own, (0,) if was_moved else _FINAL)
        threading.Thread(target=self._run, name="host", daemon=True).start()

    def poll(self, after: int, wait_s: float) -> Report:
        """Return what the process has written from line `after` on, as `PlacedProcess.poll` does."""
        self._asked_at = time.monotonic()
        return self._process.poll(after, wait_s)

    def unasked_s(self) -> float:
        """Return the seconds since a driver last asked for what was written."""
        return time.monotonic() - self._asked_at

    def stop(self, now: bool = False) -> None:
        """End the process, as `PlacedProcess.stop` does."""
        self._process.stop(now=now)

    def clock_ms(self) -> int:
        """Return the time of this node's clock."""
        return time.time_ns() // 1_000_000

    @property
    def _placed_hosts_file(self) -> Path:
        return self._folder / "placed-hosts.json"

    def _run(self) -> None:
        try:
            self._take_priority()
            ahead_ms = self._clock_ahead_ms()
            keys = self._folder / "bus.key"
            with os.fdopen(os.open(keys, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.write(self._order.secret_key)
            generations = private_dir(self._folder / "generations")
            for old in generations.iterdir():
                old.unlink()
            placed = PlacedHosts(
                hosts=self._look(), keys=str(keys), generations=str(generations), clock_ahead_ms=ahead_ms
            )
            write_placed_hosts(self._placed_hosts_file, placed)
            threading.Thread(target=self._follow, args=(placed,), name="addresses", daemon=True).start()
            self._process.run()
            for file_ in (keys, self._placed_hosts_file):
                file_.unlink(missing_ok=True)
        except Exception as error:  # noqa: BLE001  the driver has to learn why, and there is nobody else here
            self._process.fail(f"the agent cannot go on: {describe(error)}")

    def _take_priority(self) -> None:
        """Give this thread, and so what it starts, the priority of Ray itself: its workers have a low one."""
        try:
            os.setpriority(os.PRIO_PROCESS, 0, self._priority)
        except PermissionError:
            self._process.say(
                f"runs with a niceness of {os.getpriority(os.PRIO_PROCESS, 0)}, for Ray's worker_niceness is not 0"
            )

    def _clock_ahead_ms(self) -> int:
        """Return by how much the clock of the head's host is ahead of this one; waits for its agent."""
        import ray

        while self._order.head_agent:
            # It is not made yet, or its node is away, without which there is nothing to do here either.
            with contextlib.suppress(ValueError, ray.exceptions.RayError):
                head = ray.get_actor(self._order.head_agent, namespace=NAMESPACE)
                return int(ray.get(head.clock_ms.remote(), timeout=_ASK_S)) - self.clock_ms()
            time.sleep(_LOOK_EVERY_S)
        return 0

    def _look(self) -> dict[str, PlacedHost]:
        import ray

        group = ray.util.get_current_placement_group()
        where: dict[int, str] = ray.util.placement_group_table(group)["bundles_to_node_id"]
        nodes: Sequence[dict[str, Any]] = ray.nodes()
        addresses = placed_addresses(self._order.hosts, where, nodes)
        return {
            host: PlacedHost(
                address=addresses.get(host, "") if host in self._order.moving else "",
                public_key=self._order.public_keys[host],
            )
            for host in self._order.hosts
        }

    def _follow(self, placed: PlacedHosts) -> None:
        """Write the addresses again whenever a host has moved; one that is nowhere keeps its last address."""
        import ray

        while True:
            time.sleep(_LOOK_EVERY_S)
            with contextlib.suppress(ray.exceptions.RayError):  # the head of the cluster is away
                found = {name: host if host.address else placed.hosts[name] for name, host in self._look().items()}
                if found != placed.hosts:
                    placed = msgspec.structs.replace(placed, hosts=found)
                    write_placed_hosts(self._placed_hosts_file, placed)


def _environment_of(pid: int) -> dict[str, str]:
    """Return the variables that a process of this user was started with."""
    entries = Path(f"/proc/{pid}/environ").read_text(errors="surrogateescape").split("\0")
    return {name: value for name, separator, value in (entry.partition("=") for entry in entries) if separator}
