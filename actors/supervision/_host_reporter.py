"""Tells other hosts how the components of this one are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from triptych.actors.runtime.actor import Actor
from triptych.actors.runtime.handlers import DeferredReply
from triptych.actors.runtime.system_messages import LogPart, LogQuery, SupervisorQuery, SupervisorReport, SupervisorWait

if TYPE_CHECKING:
    from triptych.actors.supervision._supervisor import Supervisor


class HostReporter(Actor):
    """Answers for the supervisor of one of several hosts, over TCP.

    The supervisor itself has an ipc address, so that its children report to it however the network is.
    """

    def __init__(self, name: str, supervisor: Supervisor) -> None:
        super().__init__(name)
        self._supervisor = supervisor

    async def report(self, message: SupervisorQuery) -> SupervisorReport:
        """Return the report of every child."""
        return await self._supervisor.report(message)

    async def wait(self, message: SupervisorWait) -> DeferredReply[SupervisorReport]:
        """Return the report of every child once one of them has changed."""
        return await self._supervisor.wait(message)

    async def logs(self, message: LogQuery) -> LogPart:
        """Return lines of the log of a child or of the supervisor."""
        return await self._supervisor.logs(message)
