"""`triptych up FILE --ray ADDRESS`: Ray chooses a node for each host of a topology, and Triptych runs it there.

This process asks Ray for a placement group with one bundle for each host, makes an agent in each bundle, and shows what
they write until it is told to stop. The agents need nothing of it: Ray restarts one whose node is lost on another node,
and they learn from Ray itself where the others are.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from triptych.actors.errors import AlreadyRunningError, StartError, TopologyError, describe
from triptych.actors.placement import ray_plan
from triptych.actors.placement.ray_agent import RayAgent
from triptych.actors.topology import load_topology, stop_bound_s
from triptych.actors.topology.placed_hosts import PlacedHosts
from triptych.bus import CurveKeys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from triptych.actors.topology import Topology

_ROOM_S: Final = 60.0
_LOOK_EVERY_S: Final = 0.25
_POLL_S: Final = 5.0
_ASK_S: Final = 5.0
_WATCHED_S: Final = 15.0
_SLACK_S: Final = 10.0


def is_installed() -> bool:
    """Return whether the package `ray` is there."""
    return importlib.util.find_spec("ray") is not None


def run_on_ray(file: Path, address: str, say: Callable[[str, str], None], log_level: str = "") -> int:
    """Run a topology on a Ray cluster until this process is told to stop; return the exit code.

    Args:
        file: The topology, at the same path on every node.
        address: `HOST:PORT` of the cluster's head, or `auto`.
        say: Shows a line of a host; the host is "" for this process.
        log_level: As of `triptych up --log-level`.

    Raises `TopologyError`, `AlreadyRunningError`, and `StartError` where the cluster has no room or cannot be used.
    """
    try:
        ray_plan.check_address(address)
    except ValueError as error:
        raise StartError(str(error)) from None
    if not is_installed():
        raise StartError('--ray needs the package ray, which is missing: pip install "triptych[ray]"')
    topology = load_topology(file, PlacedHosts(hosts={}))
    if not topology.hosts:
        raise TopologyError(
            str(file),
            "[[hosts]]",
            "are missing, and Ray places each on a node",
            "add one for each machine that it takes",
        )
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address=address, namespace=ray_plan.NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise StartError(f"there is no Ray cluster at {address} that this node is part of: {error}") from error
    try:
        return _Driver(topology, str(file), say, log_level).run()
    except ray.exceptions.RayError as error:
        raise StartError(f"the Ray cluster at {address} does not answer: {describe(error)}") from error
    finally:
        ray.shutdown()


class _Driver:
    def __init__(self, topology: Topology, file: str, say: Callable[[str, str], None], log_level: str) -> None:
        self._topology = topology
        self._file = file
        self._say = say
        self._log_level = log_level
        self._hosts = tuple(host.name for host in topology.hosts)
        self._group_name = ray_plan.group_name(topology)
        self._stop_requests = 0
        self._agents: dict[str, Any] = {}
        self._lines: dict[str, int] = {}
        """Number of the next line of each host."""
        self._codes: dict[str, int] = {}
        """Of hosts that are over for good."""
        self._where: dict[str, str] = {}
        """Address of the node of each host, the last one of those that have none now."""
        self._lost: frozenset[str] = frozenset()
        """Hosts that have no node now."""

    def run(self) -> int:
        import ray

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        if warning := ray_plan.slow_settings(ray._private.state.state.get_system_config()):
            self._say("", warning)
        self._remove_earlier()
        group = None
        try:
            group = self._place()
            if group is None:
                return 0
            self._start_agents(group)
            return self._watch(group)
        finally:
            self._end(group)

    def _on_signal(self, number: int, frame: object) -> None:
        self._stop_requests += 1

    def _remove_earlier(self) -> None:
        """Remove what a driver that was killed has left, unless another one watches it."""
        import ray

        names = ray.util.list_named_actors()
        for host in self._hosts:
            if (name := ray_plan.agent_name(self._group_name, host)) in names:
                agent = ray.get_actor(name)
                try:
                    unasked_s = ray.get(agent.unasked_s.remote(), timeout=_ASK_S)
                except ray.exceptions.RayError:  # it waits for a node
                    unasked_s = _WATCHED_S
                if unasked_s < _WATCHED_S:
                    raise AlreadyRunningError(
                        f"another triptych up --ray runs {self._file} on this cluster: stop it first, "
                        f"or wait {_WATCHED_S:.0f} s if it has just been killed"
                    )
                self._say("", f"ends {host}, which an earlier triptych up --ray has left behind")
                ray.kill(agent, no_restart=True)
        groups = ray.util.placement_group_table().values()
        if any(each["name"] == self._group_name and each["state"] != "REMOVED" for each in groups):
            ray.util.remove_placement_group(ray.util.get_placement_group(self._group_name))

    def _place(self) -> Any:
        """Return the placement group when every host has a node; None if told to stop meanwhile."""
        import ray

        pinned = self._pins()
        ray_plan.check_pins(self._file, pinned, ray.nodes())
        bundles = {host: ray_plan.bundle(self._topology, host, pinned.get(host, "")) for host in self._hosts}
        group = ray.util.placement_group(
            [*bundles.values()], strategy="SPREAD", name=self._group_name, lifetime="detached"
        )
        until, told = time.monotonic() + _ROOM_S, False
        while not group.wait(1):
            if self._stop_requests or time.monotonic() > until:
                ray.util.remove_placement_group(group)
                if self._stop_requests:
                    return None
                raise StartError(ray_plan.why_not_placed(bundles, ray.nodes()))
            if not told:
                told = True
                self._say("", f"waits up to {_ROOM_S:.0f} s: {ray_plan.why_not_placed(bundles, ray.nodes())}")
        return group

    def _pins(self) -> dict[str, str]:
        import ray

        found = {}
        for host in self._topology.hosts:
            if host.address != host.name:
                try:
                    found[host.name] = socket.gethostbyname(host.address)
                except OSError as error:
                    problem, fix = f'= "{host.address}" cannot be resolved ({error.strerror})', "correct it"
                    raise TopologyError(self._file, f'[[hosts]] "{host.name}" address', problem, fix) from error
        return ray_plan.pins(self._topology, found, ray.util.get_node_ip_address())

    def _start_agents(self, group: Any) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        keys = {host: CurveKeys.new() for host in self._hosts}
        remote = ray.remote(RayAgent)
        for index, host in enumerate(self._hosts):
            head = self._topology.head_host
            order = ray_plan.Order(
                file=str(self._topology.path),
                host=host,
                head_agent="" if host == head else ray_plan.agent_name(self._group_name, head),
                hosts=self._hosts,
                moving=tuple(each.name for each in self._topology.hosts if each.address == each.name),
                public_keys={name: pair.public.decode() for name, pair in keys.items()},
                secret_key=keys[host].secret.decode(),
                log_level=self._log_level,
            )
            self._agents[host] = remote.options(
                name=ray_plan.agent_name(self._group_name, host),
                lifetime="detached",
                max_restarts=-1,
                max_concurrency=8,
                num_cpus=0,
                num_gpus=ray_plan.bundle(self._topology, host).get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, index),
            ).remote(msgspec.json.encode(order))

    def _watch(self, group: Any) -> int:
        """Show what the hosts write until this process is told to stop or they have ended."""
        import ray

        polls: dict[Any, str] = {}
        while not self._stop_requests:
            self._tell_moves(group)
            waiting = set(polls.values()) | set(self._codes)
            polls |= {self._poll(host): host for host in self._hosts if host not in waiting}
            if not polls:
                return max(self._codes.values())
            done, _ = ray.wait([*polls], timeout=_LOOK_EVERY_S)
            for reference in done:
                self._take(reference, polls.pop(reference))
            if 2 in self._codes.values():  # it can never run as configured
                return 2
        return 0

    def _poll(self, host: str, wait_s: float = _POLL_S) -> Any:
        return self._agents[host].poll.remote(self._lines.get(host, 0), wait_s)

    def _take(self, reference: Any, host: str) -> None:
        import ray

        try:
            lines, self._lines[host], code = ray.get(reference)
        except ray.exceptions.ActorDiedError as error:  # for good: Ray restarts one that its node has taken along
            why = f"the agent of {host} cannot run: {describe(error)}"
            if host not in self._lines:
                raise StartError(why) from error
            self._say("", why)
            self._codes[host] = 1
            return
        except ray.exceptions.RayError:
            self._lines[host] = 0  # the agent after this one begins anew
            time.sleep(_LOOK_EVERY_S / 5)
            return
        for line in lines:
            self._say(host, line)
        if code is not None:
            self._codes[host] = code
            self._say("", f"{host} has ended with exit code {code}")

    def _tell_moves(self, group: Any) -> None:
        import ray

        where = ray.util.placement_group_table(group)["bundles_to_node_id"]
        now = ray_plan.placed_addresses(self._hosts, where, ray.nodes())
        for host in self._hosts:
            before, after = self._where.get(host, ""), now.get(host, "")
            if after and after != before:
                self._say("", f"{host} is on {after}" if not before else f"{host} goes from {before} to {after}")
                self._where[host] = after
            elif before and not after and host not in self._lost:
                self._say("", f"the node of {host}, {before}, is lost: Ray looks for another")
        self._lost = frozenset(self._hosts).difference(now)

    def _end(self, group: Any) -> None:
        """Drain all hosts, remove the agents and the group; a second signal kills what is left."""
        import ray

        asked = self._stop_requests
        for agent in self._agents.values():
            agent.stop.remote()
        until = time.monotonic() + stop_bound_s(self._topology) + _SLACK_S
        polls = {self._poll(host, 1.0): host for host in self._agents if host not in self._codes}
        while polls and time.monotonic() < until:
            if self._stop_requests > max(asked, 1):
                for agent in self._agents.values():
                    agent.stop.remote(True)
                asked = self._stop_requests
                until = min(until, time.monotonic() + _ASK_S)
            done, _ = ray.wait([*polls], timeout=_LOOK_EVERY_S)
            for reference in done:
                host = polls.pop(reference)
                self._take(reference, host)
                if host not in self._codes and host in self._where and host not in self._lost:
                    polls[self._poll(host, 1.0)] = host
        for agent in self._agents.values():
            ray.kill(agent, no_restart=True)
        if group is not None:
            ray.util.remove_placement_group(group)
