"""The effects that a scheduler decides on; `effect_runner.py` carries them out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from triptych.roles.messages.common import Attempt, LeaseRef


@dataclass(frozen=True, slots=True)
class Assign:
    """Send the current stage of a job to an instance, for one of its credits."""

    instance: str
    job_id: str


@dataclass(frozen=True, slots=True)
class AssignPreview:
    """Send a preview to a decoder, for one of its credits."""

    instance: str
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Cancel:
    """Tell an instance to stop an attempt."""

    instance: str
    attempt: Attempt
    reason: str


@dataclass(frozen=True, slots=True)
class Park:
    """Tell an instance to give a denoise back, with a checkpoint of it."""

    instance: str
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class ReleaseLeases:
    """Release blocks of any pools."""

    leases: tuple[LeaseRef, ...]


@dataclass(frozen=True, slots=True)
class NotifyWaiters:
    """Tell the waiters of a request that it has become terminal."""

    request_id: str


@dataclass(frozen=True, slots=True)
class RestartInstance:
    """Tell an idle instance to restart with the weights that are on disk now."""

    instance: str


@dataclass(frozen=True, slots=True)
class SetInstanceAwake:
    """Tell an idle instance to load or release its weights."""

    instance: str
    awake: bool


Effect: TypeAlias = (
    Assign | AssignPreview | Cancel | Park | ReleaseLeases | NotifyWaiters | RestartInstance | SetInstanceAwake
)
