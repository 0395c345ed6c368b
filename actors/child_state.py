"""The states of a supervised child, said once for supervision, the API, the command and the tools."""

from __future__ import annotations

from enum import StrEnum
from typing import Final


class ChildState(StrEnum):
    """State of a component: its first actor's while its process runs, else its supervisor's.

    The values are those of `GET /v1/cluster` and of the log.
    """

    STARTING = "starting"
    """The supervisor starts a process."""
    LOADING = "loading"
    """The process imports, or loads weights."""
    JOINING = "joining"
    """The instance can work, and waits for the head to register it."""
    READY = "ready"
    """It works."""
    WAKING = "waking"
    """The instance loads its weights again."""
    ASLEEP = "asleep"
    """The instance can work as soon as its weights are in memory again."""
    DRAINING = "draining"
    """The process finishes or gives back its work, then ends."""
    HUNG = "hung"
    """Work of the process makes no progress."""
    CRASHED = "crashed"
    """An actor raised an unexpected error; the process ends."""
    BACKOFF = "backoff"
    """The process ended; the supervisor starts another one after a wait."""
    DELAYED = "delayed"
    """It cannot start for a reason that may pass; the supervisor tries again."""
    FAILED = "failed"
    """It can never start as configured."""
    GAVE_UP = "gave_up"
    """It was restarted too often; the supervisor leaves it."""
    STOPPED = "stopped"
    """It was asked to end, or ended and is not to be restarted."""
    DOWN = "down"
    """It does not answer, and no supervisor knows more."""


GIVEN_UP_STATES: Final = frozenset({ChildState.FAILED, ChildState.GAVE_UP})
"""States that only a person ends."""
FINAL_STATES: Final = GIVEN_UP_STATES | {ChildState.STOPPED}
"""States in which a child is not started again."""
DOWN_STATES: Final = FINAL_STATES | {ChildState.BACKOFF, ChildState.DOWN}
"""States without a process that works, as `GET /health` counts them."""
EXIT_REASON_STATES: Final = frozenset({ChildState.FAILED, ChildState.CRASHED, ChildState.HUNG})
"""States that a process reports just before it ends: kept as the reason of its exit."""
