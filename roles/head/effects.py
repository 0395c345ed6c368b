"""What the scheduler wants done outside: it decides, and `effect_runner.py` does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from triptych.roles.messages.common import Attempt, LeaseRef


@dataclass(frozen=True, slots=True)
class Assign:
    """Send the current stage of a job to an instance; one of its credits is spent."""

    instance: str
    job_id: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Tell an instance to stop an attempt."""

    instance: str
    attempt: Attempt
    reason: str


@dataclass(frozen=True, slots=True)
class ReleaseLeases:
    """Give blocks back to their pools."""

    leases: tuple[LeaseRef, ...]


@dataclass(frozen=True, slots=True)
class NotifyWaiters:
    """A request has become terminal: wake who waits for it."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RestartInstance:
    """Tell an idle instance to start anew, with the weights that are on disk now."""

    instance: str


@dataclass(frozen=True, slots=True)
class TurnInstance:
    """Tell an idle instance to bring its weights into memory, or to let go of them."""

    instance: str
    awake: bool


Effect: TypeAlias = Assign | Cancel | ReleaseLeases | NotifyWaiters | RestartInstance | TurnInstance
