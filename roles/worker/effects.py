"""What a role instance's workload wants done. The instance carries these out; the workload only decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from triptych.bus import Message
from triptych.engines.stages import Stage
from triptych.roles.messages.common import Attempt, Input, LeaseRef, Output, Rebind, StoredPayload


@dataclass(frozen=True, slots=True)
class Begin:
    """Open the attempt's place in the workspace."""

    attempt: Attempt
    inputs: dict[str, Input]
    seed: int
    rebind: Rebind | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Fetch stored tensors."""

    attempt: Attempt
    source: StoredPayload
    target: LeaseRef | None
    deadline: float


@dataclass(frozen=True, slots=True)
class Run:
    """Compute a stage."""

    attempt: Attempt
    stage: Stage


@dataclass(frozen=True, slots=True)
class Store:
    """Put the outputs into a block."""

    attempt: Attempt
    deadline: float


@dataclass(frozen=True, slots=True)
class Save:
    """Write the artifact."""

    attempt: Attempt
    output: Output
    deadline: float


@dataclass(frozen=True, slots=True)
class StopRun:
    """Stop the stream worker before the attempt's next step."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class StopTransfer:
    """Stop the transfer actor's loading, storing or saving of the attempt where it can be stopped."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class Report:
    """Deliver to the head, surely and in order."""

    message: Message


@dataclass(frozen=True, slots=True)
class Tell:
    """Tell the head if there is room."""

    message: Message


@dataclass(frozen=True, slots=True)
class ReleaseLease:
    """Give a block back to the pool."""

    lease: LeaseRef


@dataclass(frozen=True, slots=True)
class Clear:
    """Drop the attempt's tensors."""

    attempt: Attempt


Effect: TypeAlias = Begin | Load | Run | Store | Save | StopRun | StopTransfer | Report | Tell | ReleaseLease | Clear
