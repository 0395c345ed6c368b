"""GET /v1/cluster/events: the state of the system as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response

from triptych.actors import Component
from triptych.actors.runtime.system_messages import ChildReport, SupervisorReport
from triptych.api.cluster_observer import ClusterObserver
from triptych.api.event_stream import ServerEvent, event_stream
from triptych.api.operations import EVENTS, operation
from triptych.api.services import ApiRequest

SNAPSHOT_EVERY_S = 1.0
MAX_WAITING = 16
"""Events that wait for a client that reads slowly; what makes them waits then, too."""


@operation({200: EVENTS})
async def get_cluster_events(request: ApiRequest) -> Response:
    """Stream the state of the system as server-sent events, until the client hangs up.

    `cluster` is what GET /v1/cluster shows, at once and each second; `component` is one process whose state has
    changed, as soon as its supervisor knows.
    """
    return event_stream(request, ClusterEvents(request.state["services"].cluster).stream())


class ClusterEvents:
    """The events that one client gets."""

    def __init__(self, observer: ClusterObserver) -> None:
        self._observer = observer
        self._events: asyncio.Queue[ServerEvent] = asyncio.Queue(MAX_WAITING)
        self._changed_at = 0.0
        """When a component was last seen to have changed, in seconds of the monotonic clock."""

    async def stream(self) -> AsyncIterator[ServerEvent]:
        """Yield the events as they come."""
        reports = await self._observer.reports()  # what happens after the first snapshot is told, so this is before it
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(self._tell_snapshots())]
        tasks += (asyncio.create_task(self._tell_changes(name, report)) for name, report in reports.items())
        try:
            while True:
                following = asyncio.create_task(self._events.get())
                tasks.append(following)
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for ended in filter(asyncio.Task.done, tasks):
                    ended.result()  # raises what ended one of the others, which never return
                tasks.remove(following)
                yield following.result()
        finally:
            for task in tasks:
                task.cancel()

    async def _tell_snapshots(self) -> None:
        while True:
            began_at = -1.0
            while began_at < self._changed_at:  # an older one would contradict the change
                since = max(self._changed_at, time.monotonic() - SNAPSHOT_EVERY_S / 2)
                began_at, snapshot = await self._observer.shared_snapshot(since)
            await self._events.put(ServerEvent("cluster", snapshot))
            await asyncio.sleep(SNAPSHOT_EVERY_S)

    async def _tell_changes(self, supervisor: str, report: SupervisorReport | None) -> None:
        """Tell each change of the children of a supervisor since a report."""
        known = self._rows(report)
        while True:
            report = await self._observer.wait_for_change(supervisor, report.revision if report else -1)
            if report is None:  # it is gone, or its host is
                await asyncio.sleep(SNAPSHOT_EVERY_S)
                continue
            rows = self._rows(report)
            for name, row in rows.items():
                if row != known.get(name, row):
                    self._changed_at = time.monotonic()
                    await self._events.put(ServerEvent("component", {**row, "at": time.time()}))
            known = rows

    def _rows(self, report: SupervisorReport | None) -> dict[str, dict[str, Any]]:
        """Return the row of each child, by name."""
        component = self._observer.topology.component
        return {child.name: component_row(component(child.name), child) for child in report.children} if report else {}


def component_row(component: Component, child: ChildReport) -> dict[str, Any]:
    """Describe a process as its supervisor knows it."""
    return {
        "component": component.name,
        "kind": component.kind,
        "host": component.host,
        "pid": child.pid,
        "generation": child.generation,
        "state": child.state,
        "detail": child.detail,
        "reason": child.reason,
        "restarts": child.restarts,
    }
