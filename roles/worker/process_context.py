"""What the three actors of a role process share, and how one of them passes an attempt on to the next."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from triptych.actors import Actor, Component
from triptych.bus import Message
from triptych.engines.parameters.schema import Signature
from triptych.roles.messages.worker import (
    CancelAttempt,
    FetchUploads,
    LoadInputs,
    RunStage,
    SaveArtifact,
    SetWeightsLoaded,
    StoreCheckpoint,
    StoreOutputs,
    StorePreview,
)
from triptych.roles.timeline import Timeline
from triptych.roles.worker.attempts import ActiveAttempt, AttemptTracker, EndReport, Phase
from triptych.roles.worker.reporter import Reporter

STREAM: Final = ".stream"
TRANSFER: Final = ".transfer"
_SUFFIXES: Final[dict[type[Message], str]] = {
    RunStage: STREAM,
    SetWeightsLoaded: STREAM,
    FetchUploads: TRANSFER,
    LoadInputs: TRANSFER,
    StoreOutputs: TRANSFER,
    StoreCheckpoint: TRANSFER,
    StorePreview: TRANSFER,
    SaveArtifact: TRANSFER,
}
"""Which actor of the process a message is for; every other message is for the instance."""


class ProcessContext:
    """One role process: its attempts, its reports, and what has to be there before it can take work."""

    def __init__(
        self, component: Component, timeline: Timeline | None = None, *, fetches_uploads: bool = False
    ) -> None:
        self.instance = component.name
        self.timeline = timeline or Timeline()
        """When the actors of this process did what."""
        self.attempts = AttemptTracker(component.name, component.kind, component.slots, fetches_uploads=fetches_uploads)
        self.reporter = Reporter(structlog.stdlib.get_logger("actor").bind(actor=component.name))
        self.signature = Signature()
        """What the loaded pipeline takes and makes."""
        self.model = ""
        """Version of the loaded weights, of `engines.weights.model_version`."""
        self.awake = False
        """Whether the weights are in memory."""
        self.weights = 0
        """Bytes of the weights, as they were last loaded."""
        self.device = "cpu"
        """Torch device, a GPU with its number."""
        self.trouble = ""
        """A problem that work waits for and that an operator may have to solve; a sentence, or ""."""
        self.lease_ahead: Callable[[ActiveAttempt], None] = _no_lease
        """Have a block leased for the outputs of an attempt that are nearly computed; set by the transfer actor."""
        self.end_attempt: Callable[[EndReport], None] = _no_end
        """Report the end of an attempt to the head, and return its credit; set by the instance."""
        self.tell_head: Callable[[Message], None] = _no_head
        """Tell the head how far a stage is, if the head is there; set by the instance."""
        self._loaded = asyncio.Event()
        self._mapped = asyncio.Event()

    def pass_on(self, sender: Actor, message: Message) -> None:
        """Tell the actor of this process that `message` is for; the report of an attempt's end is for the head.

        An attempt's phase changes with the message that passes it on, so a cancellation reaches the actor that has it;
        if it arrives before that message, the actor sees `ActiveAttempt.cancelled`.
        """
        if isinstance(message, EndReport):
            self.end_attempt(message)
            return
        if isinstance(message, CancelAttempt):
            suffix = STREAM if self.attempts.active[message.attempt].phase is Phase.RUNNING else TRANSFER
        else:
            suffix = _SUFFIXES.get(type(message), "")
        sender.reference(self.instance + suffix).tell(message)

    def model_known(self, model: str, device: str) -> None:
        """Say that the stream worker can load its weights, of which version, and where to."""
        self.model, self.device = model, device
        self._loaded.set()

    def model_loaded(self, signature: Signature, weights: int) -> None:
        """Say that the stream worker has its weights."""
        self.signature, self.weights, self.awake = signature, weights, True

    def pool_mapped(self) -> None:
        """Say that the transfer actor sees the pool's memory, or needs none."""
        self._mapped.set()

    async def until_ready(self) -> None:
        """Return once the model is known and the pool is mapped."""
        await self._loaded.wait()
        await self._mapped.wait()


def _no_lease(_: ActiveAttempt) -> None:
    """Do nothing: the transfer actor has not started."""


def _no_head(_: Message) -> None:
    """Do nothing: the instance has not joined."""


def _no_end(report: EndReport) -> None:
    raise RuntimeError(f"{report.attempt} has ended in a process without an instance")
