"""What a role instance's workload wants done. The instance carries these out; the workload only decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from triptych.bus import Message
from triptych.engines.panels import Panel
from triptych.roles.messages.work import Input, LeaseRef, Output, Renewal, Staged, Work


@dataclass(frozen=True, slots=True)
class Begin:
    """Open the work's place in the workspace."""

    work: Work
    inputs: dict[str, Input]
    seed: int
    renewal: Renewal | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Fetch staged tensors."""

    work: Work
    source: Staged
    target: LeaseRef | None
    deadline: float


@dataclass(frozen=True, slots=True)
class Run:
    """Compute a panel."""

    work: Work
    panel: Panel


@dataclass(frozen=True, slots=True)
class Stage:
    """Put the outputs into a slot."""

    work: Work
    deadline: float


@dataclass(frozen=True, slots=True)
class Save:
    """Write the artifact."""

    work: Work
    output: Output
    deadline: float


@dataclass(frozen=True, slots=True)
class StopPanel:
    """Stop the stream worker before the work's next step."""

    work: Work


@dataclass(frozen=True, slots=True)
class StopTransfer:
    """Stop the transfer actor's loading, staging or saving of the work where it can be stopped."""

    work: Work


@dataclass(frozen=True, slots=True)
class Report:
    """Deliver to the head, surely and in order."""

    message: Message


@dataclass(frozen=True, slots=True)
class Mention:
    """Tell the head if there is room."""

    message: Message


@dataclass(frozen=True, slots=True)
class Release:
    """Give a slot back to the pool."""

    lease: LeaseRef


@dataclass(frozen=True, slots=True)
class Clear:
    """Drop the work's tensors."""

    work: Work


Effect: TypeAlias = Begin | Load | Run | Stage | Save | StopPanel | StopTransfer | Report | Mention | Release | Clear
