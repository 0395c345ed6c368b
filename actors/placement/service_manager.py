"""Tell the service manager that runs this supervisor, such as systemd or Kubernetes, how it is.

systemd gets datagrams at the socket `$NOTIFY_SOCKET` (sd_notify(3)). A probe that can only look at files, as those of
Kubernetes do, gets the file `$TRIPTYCH_STATUS_FILE`: its first word is `ready` or `waiting`, and its modification time
says when the supervisor last ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from triptych.actors.child_state import ChildState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, MutableMapping

    from triptych.actors.runtime.system_messages import ChildReport

NOTIFY_VARIABLE: Final = "NOTIFY_SOCKET"
STATUS_VARIABLE: Final = "TRIPTYCH_STATUS_FILE"
EVERY_S: Final = 1.0
_SERVING: Final = frozenset({ChildState.READY, ChildState.ASLEEP, ChildState.WAKING})
_log = structlog.stdlib.get_logger("actors")


def describe_status(states: Mapping[str, ChildState | None]) -> tuple[bool, str]:
    """Return whether every component serves, and a line that says which do not. Pure.

    Args:
        states: The state of each component by its name, None before its first report.
    """
    waiting = [f"{name} {state or 'not started'}" for name, state in states.items() if state not in _SERVING]
    if waiting:
        return False, f"waiting: {', '.join(waiting)}"
    return True, f"ready: {', '.join(states)}"


class StatusReporter:
    """Reports the state of the components of one supervisor until `run` is cancelled.

    Args:
        environment: Where the socket and the file are named. The socket is removed from it: it is not for children.
    """

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        self._states: dict[str, ChildState | None] = {}
        self._socket = environment.pop(NOTIFY_VARIABLE, "")
        file = environment.get(STATUS_VARIABLE, "")
        self._file = Path(file) if file else None
        self._changed = asyncio.Event()
        self._was_ready = False

    def watch(self, components: Iterable[str]) -> None:
        """Take the names of the components, which have not started yet."""
        self._states |= dict.fromkeys(components)

    def changed(self, report: ChildReport) -> None:
        """Take the report of a child that has changed."""
        self._states[report.name] = report.state
        self._changed.set()

    async def run(self) -> None:
        """Report each change, and each second that the supervisor runs; return at once if nobody asks."""
        while self._socket or self._file:
            self._changed.clear()
            self._report()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), EVERY_S)

    def _report(self) -> None:
        ready, line = describe_status(self._states)
        try:
            if self._file is not None:
                fresh = self._file.with_name(f"{self._file.name}.new")
                fresh.write_text(f"{line}\n")
                fresh.replace(self._file)
            if self._socket:
                first = "READY=1\n" if ready and not self._was_ready else ""
                notify(self._socket, f"{first}STATUS={line}\nWATCHDOG=1")
                self._was_ready = self._was_ready or ready
        except OSError as error:  # the manager then acts as if the supervisor were hung, which it may want to
            _log.warning("cannot tell the service manager", error=str(error))


def notify(address: str, text: str) -> None:
    """Send one datagram to the socket of systemd; "@" stands for an abstract address. Raises `OSError`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        sender.sendto(text.encode(), f"\0{address[1:]}" if address.startswith("@") else address)
