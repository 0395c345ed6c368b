"""What the three actors of a role process share: the tensors of the work in hand, and whether they can begin."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from triptych.engines.parameters import Signature
from triptych.roles.messages.work import Renewal, Work

if TYPE_CHECKING:
    from triptych.engines.streams import StreamEvent


class NotInWorkspace(LookupError):  # noqa: N818  names what is the case
    """Nothing is kept for this work: it was never begun here, or it has been cleared."""

    def __init__(self, work: Work) -> None:
        super().__init__(f"{work} is not in the workspace")
        self.work = work


@dataclass(slots=True)
class Held:
    """What is kept for one piece of work."""

    values: dict[str, object] = field(default_factory=dict)
    """Inputs of the next panel, by name: tensors on the device, and plain values."""
    seed: int = 0
    """Of the picture; the encoder panel makes its generator from it."""
    renewal: Renewal | None = None
    """What makes loaded values this work's own, where they were made for another."""
    ready: StreamEvent | None = None
    """End of the work that made `values`; who uses them on another stream waits for it first."""


class Workspace:
    """Work to values. Used from the event loop's thread alone."""

    def __init__(self) -> None:
        self._held: dict[Work, Held] = {}

    def begin(
        self, work: Work, values: dict[str, object] | None = None, seed: int = 0, renewal: Renewal | None = None
    ) -> None:
        """Make room for a piece of work, in place of anything kept for it before."""
        self._held[work] = Held(dict(values or {}), seed, renewal)

    def get(self, work: Work) -> Held:
        """Find what is kept for `work`.

        Raises:
            NotInWorkspace: when that is nothing.
        """
        try:
            return self._held[work]
        except KeyError:
            raise NotInWorkspace(work) from None

    def replace(self, work: Work, values: dict[str, object], ready: StreamEvent | None = None) -> None:
        """Put a panel's outputs, or what was loaded, in place of the values; the seed stays.

        Raises:
            NotInWorkspace: when nothing is kept for `work`.
        """
        held = self.get(work)
        held.values = values
        held.ready = ready

    def clear(self, work: Work) -> None:
        """Forget the work and drop its tensors; nothing when there are none."""
        self._held.pop(work, None)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, work: Work) -> bool:
        return work in self._held


class Premises:
    """One role process: its workspace, and what has to be there before it can take work."""

    def __init__(self) -> None:
        self.workspace = Workspace()
        self.signature = Signature()
        """What the loaded pipeline takes and makes."""
        self.model = ""
        """Version of the loaded weights, of `engines.model_version`."""
        self.awake = False
        """Whether the weights are in memory."""
        self.weights = 0
        """Bytes of the weights, as they were last loaded."""
        self.device = "cpu"
        """Torch device, a card with its number."""
        self.trouble = ""
        """What work waits for that a person may have to mend; a sentence."""
        self._loaded = asyncio.Event()
        self._mapped = asyncio.Event()

    def model_found(self, model: str, device: str) -> None:
        """Say that the stream worker can load its weights, of which version, and where to."""
        self.model, self.device = model, device
        self._loaded.set()

    def model_loaded(self, signature: Signature, weights: int) -> None:
        """Say that the stream worker has its weights."""
        self.signature, self.weights, self.awake = signature, weights, True

    def pool_mapped(self) -> None:
        """Say that the transfer actor sees the pool's memory, or needs none."""
        self._mapped.set()

    async def complete(self) -> None:
        """Return once both have been said."""
        await self._loaded.wait()
        await self._mapped.wait()
