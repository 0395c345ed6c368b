"""What the ledger wants done in the world. The head carries these out; the ledger only decides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from triptych.roles.messages.work import LeaseRef, Work


@dataclass(frozen=True, slots=True)
class Assign:
    """Send the unit's current stage to an instance; one of its credits is spent."""

    instance: str
    unit_id: str


@dataclass(frozen=True, slots=True)
class Cancel:
    """Tell an instance to stop a piece of work."""

    instance: str
    work: Work
    reason: str


@dataclass(frozen=True, slots=True)
class Release:
    """Give slots back to their pools."""

    leases: tuple[LeaseRef, ...]


@dataclass(frozen=True, slots=True)
class Settle:
    """A request has become terminal: wake who waits for it."""

    request_id: str


@dataclass(frozen=True, slots=True)
class Restart:
    """Tell an idle instance to start anew, with the weights that are on disk now."""

    instance: str


@dataclass(frozen=True, slots=True)
class Turn:
    """Tell an idle instance to bring its weights into memory, or to let go of them."""

    instance: str
    awake: bool


Effect: TypeAlias = Assign | Cancel | Release | Settle | Restart | Turn
