"""What the three actors of a role process share: the tensors of the attempt in hand, and whether they can begin."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from triptych.engines.parameters.schema import Signature
from triptych.roles.messages.common import Attempt, Rebind

if TYPE_CHECKING:
    from triptych.engines.memory.streams import StreamEvent


class NotInWorkspaceError(LookupError):
    """Nothing is kept for this attempt: it was never begun here, or it has been cleared."""

    def __init__(self, attempt: Attempt) -> None:
        super().__init__(f"{attempt} is not in the workspace")
        self.attempt = attempt


@dataclass(slots=True)
class AttemptValues:
    """What is kept for one piece of work."""

    values: dict[str, object] = field(default_factory=dict)
    """Inputs of the next stage, by name: tensors on the device, and plain values."""
    seed: int = 0
    """Of the image; the encoder makes its generator from it."""
    rebind: Rebind | None = None
    """What makes loaded values this attempt's own, where they were made for another."""
    ready: StreamEvent | None = None
    """End of the attempt that made `values`; who uses them on another stream waits for it first."""


class Workspace:
    """Work to values. Used from the event loop's thread alone."""

    def __init__(self) -> None:
        self._entries: dict[Attempt, AttemptValues] = {}

    def begin(
        self, attempt: Attempt, values: dict[str, object] | None = None, seed: int = 0, rebind: Rebind | None = None
    ) -> None:
        """Make room for an attempt, in place of anything kept for it before."""
        self._entries[attempt] = AttemptValues(dict(values or {}), seed, rebind)

    def get(self, attempt: Attempt) -> AttemptValues:
        """Find what is kept for `attempt`.

        Raises:
            NotInWorkspaceError: when that is nothing.
        """
        try:
            return self._entries[attempt]
        except KeyError:
            raise NotInWorkspaceError(attempt) from None

    def replace(self, attempt: Attempt, values: dict[str, object], ready: StreamEvent | None = None) -> None:
        """Put a stage's outputs, or what was loaded, in place of the values; the seed stays.

        Raises:
            NotInWorkspaceError: when nothing is kept for `attempt`.
        """
        entry = self.get(attempt)
        entry.values = values
        entry.ready = ready

    def clear(self, attempt: Attempt) -> None:
        """Forget the attempt and drop its tensors; nothing when there are none."""
        self._entries.pop(attempt, None)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, attempt: Attempt) -> bool:
        return attempt in self._entries


class ProcessContext:
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
        """Torch device, a GPU with its number."""
        self.trouble = ""
        """What work waits for that a person may have to mend; a sentence."""
        self._loaded = asyncio.Event()
        self._mapped = asyncio.Event()

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
        """Return once both have been said."""
        await self._loaded.wait()
        await self._mapped.wait()
