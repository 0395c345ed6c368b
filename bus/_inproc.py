"""Who is to be told when an inproc mailbox closes: ZMQ's monitor does not see inproc connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

Watch = tuple[asyncio.AbstractEventLoop, Callable[[], None]]
_watches: dict[str, dict[int, Watch]] = {}


def watch(name: str, key: int, closed: Callable[[], None]) -> None:
    """Call `closed` on the running loop when the mailbox at `inproc://name` closes; once."""
    _watches.setdefault(name, {})[key] = (asyncio.get_running_loop(), closed)


def unwatch(name: str, key: int) -> None:
    """Forget the watch, if it is still there."""
    _watches.get(name, {}).pop(key, None)


def announce_closed(name: str) -> None:
    """Tell everyone who watches; safe across threads."""
    for loop, closed in _watches.pop(name, {}).values():
        if not loop.is_closed():
            loop.call_soon_threadsafe(closed)
