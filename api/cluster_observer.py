"""The state of the system: every actor and every pool, asked at the time of the request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from triptych.actors import AddressBook, Component, Topology
from triptych.actors.child_state import GIVEN_UP_STATES, ChildState
from triptych.actors.runtime.address_book import supervisor_of
from triptych.actors.runtime.metrics import merge
from triptych.actors.runtime.system_messages import (
    ChildReport,
    DeadLetterQuery,
    DeadLetterReport,
    Inspect,
    Inspection,
    MetricsQuery,
    MetricsReport,
    SupervisorQuery,
    SupervisorReport,
    SupervisorWait,
)
from triptych.api.responses import to_builtins
from triptych.bus import BusError, HandshakeRefusedError, Message, Reference
from triptych.roles.messages.pool import PoolDescription, PoolQuery
from triptych.roles.messages.requests import ClusterQuery, ClusterView, InstanceView

PROBE_TIMEOUT_S = 1.0
"""A healthy actor answers within milliseconds; one that does not is shown as down."""

SUPERVISOR_WAIT_S = 20.0
"""Of one wait for a change; short, for the case of a supervisor that is gone while its connection seems up."""

PRIVATE = ("pid", "fd", "session", "base_address", "arena")
"""What is not shown of a pool."""

_UP = (ChildState.READY, ChildState.ASLEEP)

R = TypeVar("R", bound=Message)
T = TypeVar("T")
Reports = Mapping[str, SupervisorReport | None]


class Readiness(NamedTuple):
    """What GET /ready says."""

    ready: bool
    reasons: list[str]
    gave_up: list[str]


class _Shared(Generic[T]):
    """What a call returns, for all who want it at about the same time."""

    def __init__(self, call: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._call = call
        self._task: asyncio.Task[T] | None = None
        self._began_at = 0.0

    async def get(self, since: float) -> tuple[float, T]:
        """Return the result of a call that was begun at or after `since`, and when."""
        if self._task is None or self._began_at < since:
            self._task, self._began_at = asyncio.create_task(self._call()), time.monotonic()
        task, began_at = self._task, self._began_at
        return began_at, await asyncio.shield(task)


class ClusterObserver:
    """Asks the actors of a topology, all at once."""

    def __init__(self, topology: Topology, address_book: AddressBook, reference: Callable[[str], Reference]) -> None:
        self.topology = topology
        self.address_book = address_book
        self.reference = reference
        self._refusals: dict[
            str, str
        ] = {}  # why the last handshake with an actor was refused, "" if it was not, by its name
        self._snapshot = _Shared(self.snapshot)
        self._readiness = _Shared(self.readiness)

    async def readiness(self) -> Readiness:
        """Ask the head, and the supervisors for children that are not started any more."""
        head, reports = await asyncio.gather(self._ask("head", ClusterQuery(), ClusterView), self.reports())
        silent = silent_hosts(self.topology, reports)
        return assess_readiness(head, children_of(reports).values(), silent, self._refusals)

    async def give_up_reason(self, name: str) -> str:
        """Why a child is not started any more; "" while it is, or where that is not known."""
        child = children_of(await self.reports()).get(name)
        return child.reason or child.state if child and child.state in GIVEN_UP_STATES else ""

    async def snapshot(self) -> dict[str, Any]:
        """Return the state of everything as plain data; takes at most about `PROBE_TIMEOUT_S`."""
        components = self.topology.components
        pools = [component.name for component in components if component.kind == "pool"]
        head, reports, inspections, letters, descriptions = await asyncio.gather(
            self._ask("head", ClusterQuery(), ClusterView),
            self.reports(),
            self._ask_all([component.name for component in components], Inspect(), Inspection),
            self._ask_all([component.name for component in components], DeadLetterQuery(), DeadLetterReport),
            self._ask_all(pools, PoolQuery(), PoolDescription),
        )
        children = children_of(reports)
        silent = silent_hosts(self.topology, reports)
        readiness = assess_readiness(head, children.values(), silent, self._refusals)
        instances = {instance.name: instance for instance in head.instances} if head else {}
        actors = [
            row
            for component in components
            for row in actor_rows(
                component,
                inspections[component.name],
                children.get(component.name),
                instances.get(component.name),
            )
        ]
        return {
            "ready": readiness.ready,
            "reasons": readiness.reasons,
            "gave_up": readiness.gave_up,
            "hosts": host_rows(self.topology, reports),
            "actors": actors,
            "pools": [
                _public_view(found) if found else {"name": name, "transport": None, "state": ChildState.DOWN}
                for name, found in descriptions.items()
            ],
            "head": to_builtins(head),
            "dead_letters": {name: to_builtins(report) for name, report in letters.items() if report},
        }

    async def shared_snapshot(self, since: float) -> tuple[float, dict[str, Any]]:
        """Return a snapshot that was begun at or after `since`, and when; those who ask together get the same one.

        Both are seconds of this host's monotonic clock.
        """
        return await self._snapshot.get(since)

    async def shared_readiness(self, since: float) -> Readiness:
        """Return what `readiness` said when asked at or after `since`, as `shared_snapshot` does."""
        return (await self._readiness.get(since))[1]

    async def wait_for_change(self, supervisor: str, revision: int) -> SupervisorReport | None:
        """Return what a supervisor says once that is another revision, or after a while; None if it does not answer."""
        wait = SupervisorWait(revision, SUPERVISOR_WAIT_S)
        return await self._ask(supervisor, wait, SupervisorReport, SUPERVISOR_WAIT_S + PROBE_TIMEOUT_S)

    async def metrics(self) -> list[Metric]:
        """Return the metrics of all processes that answer, and what their supervisors know."""
        names = [component.name for component in self.topology.components]
        answers, reports = await asyncio.gather(self._ask_all(names, MetricsQuery(), MetricsReport), self.reports())
        texts = {name: report.text for name, report in answers.items() if report}
        up = GaugeMetricFamily("triptych_up", "Whether a component answers.", labels=["component"])
        restarts = CounterMetricFamily(
            "triptych_restarts", "How often the supervisor has restarted a component.", labels=["component"]
        )
        for name, report in answers.items():
            up.add_metric([name], report is not None)
        for child in children_of(reports).values():
            restarts.add_metric([child.name], child.restarts)
        return [*merge(texts), up, restarts]

    async def reports(self) -> Reports:
        """Return what each supervisor says, by its name; None from one that does not answer."""
        return await self._ask_all(self.address_book.supervisors(), SupervisorQuery(), SupervisorReport)

    async def _ask_all(self, names: Iterable[str], message: Message, reply: type[R]) -> dict[str, R | None]:
        names = tuple(names)
        answers = await asyncio.gather(*(self._ask(name, message, reply) for name in names))
        return dict(zip(names, answers, strict=True))

    async def _ask(self, name: str, message: Message, reply: type[R], timeout_s: float = PROBE_TIMEOUT_S) -> R | None:
        answer, refusal = None, ""
        try:
            answer = await self.reference(name).ask(message, reply, timeout_s=timeout_s)
        except BusError as error:  # the caller shows an actor that does not answer as down
            refusal = str(error) if isinstance(error, HandshakeRefusedError) else ""
        self._refusals[name] = refusal
        return answer


def _public_view(pool: PoolDescription) -> dict[str, Any]:
    """Describe a pool without what others would need to reach into its memory."""
    return {key: value for key, value in to_builtins(pool).items() if key not in PRIVATE}


def children_of(reports: Reports) -> dict[str, ChildReport]:
    """Return what supervisors know of each component, by name."""
    return {child.name: child for report in reports.values() if report for child in report.children}


def silent_hosts(topology: Topology, reports: Reports) -> list[str]:
    """Return the names of the hosts of which no supervisor answers, where there are several."""
    if len(topology.hosts) < 2:
        return []
    known = {topology.component(name).host for name in children_of(reports)}
    answering = {host.name for host in topology.hosts if reports.get(supervisor_of(host.name))}
    return [host.name for host in topology.hosts if host.name not in known | answering]


def host_rows(topology: Topology, reports: Reports) -> list[dict[str, Any]]:
    """Make a row for each host: "ready" if all its components are, "down" if no supervisor there answers."""
    silent, children = silent_hosts(topology, reports), children_of(reports)
    rows = []
    for host in topology.hosts:
        here = [component.name for component in topology.on_host(host.name)]
        known = [children[name] for name in here if name in children]
        up = len(known) == len(here) and all(child.state in _UP for child in known)
        rows.append(
            {
                "name": host.name,
                "address": host.address,
                "state": ChildState.DOWN if host.name in silent else ChildState.READY if up else "not ready",
                "components": here,
                "restarts": sum(child.restarts for child in known),
                "gave_up": [child.name for child in known if child.state in GIVEN_UP_STATES],
            }
        )
    return rows


def assess_readiness(
    head: ClusterView | None,
    children: Collection[ChildReport],
    silent: Collection[str] = (),
    refusals: Mapping[str, str] = MappingProxyType({}),
) -> Readiness:
    """Decide by what the head says and by what was given up, which only an operator can bring back.

    A host in `silent` is a reason to look, and not to refuse requests: that is for the head to say. `refusals` has
    sentences of refused handshakes, by the name of the actor that was asked.
    """
    gave_up = [f"{child.name}: {child.reason}" for child in children if child.state in GIVEN_UP_STATES]
    delayed = [
        f"{child.name} cannot start yet: {child.reason}" for child in children if child.state == ChildState.DELAYED
    ]
    why = {name: refusals.get(supervisor_of(name), "") for name in silent}
    lost = [f"host {name} does not answer{why[name] and f': {why[name]}'}" for name in silent]
    reasons = [*(head.reasons if head else ["the head does not answer"]), *gave_up, *delayed, *lost]
    return Readiness(head is not None and head.ready and not gave_up, reasons, gave_up)


def actor_rows(
    component: Component,
    inspection: Inspection | None,
    child: ChildReport | None,
    instance: InstanceView | None,
) -> list[dict[str, Any]]:
    """Make a row for each actor of the component's process; a single one if that does not answer."""
    credit: dict[str, Any] = {}
    if instance is not None:
        credit = {"credits": instance.credits, "slots": instance.slots, "running": list(instance.running)}
    if child is not None:
        credit["start_s"] = child.start_s
    if inspection is None:
        return [{**unreachable_row(component, child), **credit}]
    place = {"component": component.name, "host": component.host}
    found: list[dict[str, Any]] = [{**to_builtins(status), **place} for status in inspection.actors]
    for row in found[:1]:
        row.update(credit)
        if child is not None and row["state"] == child.state:  # its supervisor knows all actors of the process
            row["detail"] = row["detail"] or child.detail
    return found


def unreachable_row(component: Component, child: ChildReport | None) -> dict[str, Any]:
    """Describe a process that does not answer, with what its supervisor knows."""
    row: dict[str, Any] = {
        "name": component.name,
        "kind": component.kind,
        "component": component.name,
        "host": component.host,
        "pid": 0,
        "generation": 0,
        "state": ChildState.DOWN,
        "detail": "",
        "restarts": 0,
    }
    if child is not None:
        row.update(pid=child.pid, generation=child.generation, restarts=child.restarts)
        row["detail"] = child.detail or child.reason
        if child.state != ChildState.READY:
            row["state"] = child.state
    return row
