"""Announces that an inproc mailbox has closed: ZMQ's monitor does not see inproc connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

Watch = tuple[asyncio.AbstractEventLoop, Callable[[], None]]
_watches: dict[str, dict[int, Watch]] = {}


def watch(name: str, key: int, closed: Callable[[], None]) -> None:
    """Call `closed` on the running loop when the mailbox at `inproc://name` closes; once."""
    _watches.setdefault(name, {})[key] = (asyncio.get_running_loop(), closed)


def unwatch(name: str, key: int) -> None:
    """Remove a watch; no-op if there is none."""
    _watches.get(name, {}).pop(key, None)


def announce_closed(name: str) -> None:
    """Call every watch of a mailbox on its own loop; safe across threads."""
    for loop, closed in _watches.pop(name, {}).values():
        if not loop.is_closed():
            loop.call_soon_threadsafe(closed)
