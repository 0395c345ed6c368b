"""The state of the system: every actor and every pool, asked at the time of the request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple, TypeVar

from triptych.actors import AddressBook, Component, Topology
from triptych.actors.child_state import GIVEN_UP_STATES, ChildState
from triptych.actors.runtime.system_messages import (
    ChildReport,
    DeadLetterQuery,
    DeadLetterReport,
    Inspect,
    Inspection,
    SupervisorQuery,
    SupervisorReport,
)
from triptych.api.responses import to_builtins
from triptych.bus import BusError, Message, Reference
from triptych.roles.messages.pool import PoolDescription, PoolQuery
from triptych.roles.messages.requests import ClusterQuery, ClusterView, InstanceView

PROBE_TIMEOUT_S = 1.0
"""A healthy actor answers within milliseconds; one that does not is shown as down."""

_PRIVATE = ("pid", "fd", "session", "base_address", "arena")

R = TypeVar("R", bound=Message)


class Readiness(NamedTuple):
    """What GET /ready says."""

    ready: bool
    reasons: list[str]
    gave_up: list[str]


class ClusterObserver:
    """Asks the actors of a topology, all at once."""

    def __init__(self, topology: Topology, address_book: AddressBook, reference: Callable[[str], Reference]) -> None:
        self.topology = topology
        self.address_book = address_book
        self.reference = reference

    async def readiness(self) -> Readiness:
        """Ask the head, and the supervisors for children that are not started any more."""
        head, children = await asyncio.gather(self._ask("head", ClusterQuery(), ClusterView), self._children())
        return assess_readiness(head, children.values())

    async def give_up_reason(self, name: str) -> str:
        """Why a child is not started any more; "" while it is, or where that is not known."""
        child = (await self._children()).get(name)
        return child.reason or child.state if child and child.state in GIVEN_UP_STATES else ""

    async def snapshot(self) -> dict[str, Any]:
        """Return the state of everything as plain data; takes at most about `PROBE_TIMEOUT_S`."""
        components = self.topology.components
        pools = [component.name for component in components if component.kind == "pool"]
        head, children, inspections, letters, descriptions = await asyncio.gather(
            self._ask("head", ClusterQuery(), ClusterView),
            self._children(),
            self._ask_all([component.name for component in components], Inspect(), Inspection),
            self._ask_all([component.name for component in components], DeadLetterQuery(), DeadLetterReport),
            self._ask_all(pools, PoolQuery(), PoolDescription),
        )
        readiness = assess_readiness(head, children.values())
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
            "actors": actors,
            "pools": [
                _public_view(found) if found else {"name": name, "transport": None, "state": ChildState.DOWN}
                for name, found in descriptions.items()
            ],
            "head": to_builtins(head),
            "dead_letters": {name: to_builtins(report) for name, report in letters.items() if report},
        }

    async def _children(self) -> dict[str, ChildReport]:
        reports = await self._ask_all(self.address_book.supervisors(), SupervisorQuery(), SupervisorReport)
        return {child.name: child for report in reports.values() if report for child in report.children}

    async def _ask_all(self, names: Iterable[str], message: Message, reply: type[R]) -> dict[str, R | None]:
        names = tuple(names)
        answers = await asyncio.gather(*(self._ask(name, message, reply) for name in names))
        return dict(zip(names, answers, strict=True))

    async def _ask(self, name: str, message: Message, reply: type[R]) -> R | None:
        try:
            return await self.reference(name).ask(message, reply, timeout_s=PROBE_TIMEOUT_S)
        except BusError:  # the caller shows an actor that does not answer as down
            return None


def _public_view(pool: PoolDescription) -> dict[str, Any]:
    """Describe a pool without what others would need to reach into its memory."""
    return {key: value for key, value in to_builtins(pool).items() if key not in _PRIVATE}


def assess_readiness(head: ClusterView | None, children: Collection[ChildReport]) -> Readiness:
    """Decide by what the head says and by what was given up, which only an operator can bring back."""
    gave_up = [f"{child.name}: {child.reason}" for child in children if child.state in GIVEN_UP_STATES]
    delayed = [
        f"{child.name} cannot start yet: {child.reason}" for child in children if child.state == ChildState.DELAYED
    ]
    reasons = [*(head.reasons if head else ["the head does not answer"]), *gave_up, *delayed]
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
    found: list[dict[str, Any]] = [{**to_builtins(status), "component": component.name} for status in inspection.actors]
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
