"""What a supervisor and its zygote say to each other."""

from __future__ import annotations

from typing import Final

import msgspec

MAX_MESSAGE_BYTES: Final = 1 << 16


class Warm(msgspec.Struct, frozen=True, tag=True):
    """The imports are done."""

    seconds: float
    """What they took."""
    problem: str
    """Why no fork will ever be possible, "" if none is known."""


class Fork(msgspec.Struct, frozen=True, tag=True):
    """Fork a process and run `actors.supervision.component_process` in it."""

    arguments: tuple[str, ...]
    """Its command line."""


class Forked(msgspec.Struct, frozen=True, tag=True):
    """The answer to a `Fork`."""

    pid: int
    """The new process, a child of the supervisor; 0 if there is none."""
    problem: str
    """Why there is none, else ""."""
