"""Dead letters, messages that were not handled: how many, and the last ones."""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

import msgspec
import structlog

if TYPE_CHECKING:
    from triptych.bus._wire import Envelope

MAX_RECENT: Final = 100
_MAX_DETAIL_CHARACTERS: Final = 500  # a peer may have written a megabyte
_LOG_EVERY_S: Final = 1.0
_log = structlog.stdlib.get_logger("bus")


class DeadLetter(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One message that was not handled."""

    at: float
    """Unix seconds."""
    reason: str
    """A `FailureCode`, or another reason: "unreadable", "late_reply", "peer_gone", ..."""
    to: str
    """Intended receiver, "" if the envelope could not be read."""
    sender: str
    """Sender's name, "" if the envelope could not be read."""
    generation: int
    """Sender's generation."""
    detail: str
    """One sentence."""


class DeadLetters:
    """Counts every dead letter and keeps the last `MAX_RECENT`.

    Each is logged, but at most one line a second: the line says how many there have been.
    """

    def __init__(self) -> None:
        self.count = 0
        self._recent: deque[DeadLetter] = deque(maxlen=MAX_RECENT)
        self._logged_at = float("-inf")

    @property
    def recent(self) -> tuple[DeadLetter, ...]:
        """The last ones, oldest first."""
        return tuple(self._recent)

    def add(self, reason: str, detail: str, envelope: Envelope | None = None) -> None:
        """Record that the message of `envelope` (None: unreadable) was not handled."""
        to, sender, generation = (
            ("", "", 0) if envelope is None else (envelope.to, envelope.sender, envelope.generation)
        )
        letter = DeadLetter(time.time(), str(reason), to, sender, generation, detail[:_MAX_DETAIL_CHARACTERS])
        self.count += 1
        self._recent.append(letter)
        now = time.monotonic()
        if now - self._logged_at >= _LOG_EVERY_S:
            self._logged_at = now
            _log.warning("dead letter", count=self.count, **msgspec.structs.asdict(letter))
