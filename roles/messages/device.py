"""Inside one role process: the instance, its stream worker and its transfer actor.

Tensors never ride in a message: these name the work, and the values lie in the process's `Workspace`.
"""

from __future__ import annotations

from triptych.bus import Message
from triptych.engines.panels import Panel
from triptych.roles.messages.work import Artifact, LeaseRef, Natural, Output, Seconds, Staged, Work


class RunPanel(Message):
    """Instance to stream worker: run this panel on the workspace's values."""

    work: Work
    panel: Panel


class CancelPanel(Message):
    """Instance to stream worker: stop before the next step."""

    work: Work


class TurnWeights(Message):
    """Instance to stream worker: bring the weights into memory, or let go of them."""

    awake: bool


class WeightsTurned(Message):
    """Stream worker to instance: that is done, or could not be."""

    awake: bool
    """Whether the weights are in memory now."""
    seconds: Seconds
    trouble: str = ""
    """Why they are not, where they should be."""


class PanelStarted(Message):
    """Stream worker to instance."""

    work: Work
    panel: Panel


class PanelStepped(Message):
    """Stream worker to instance: a denoising step is done."""

    work: Work
    step: Natural
    total_steps: Natural


class PanelFinished(Message):
    """Stream worker to instance: the outputs are in the workspace."""

    work: Work
    panel: Panel
    seconds: Seconds
    seedless: bool = False
    """The outputs of an encoder are the same for every seed, but for the generator among them."""


class PanelFailed(Message):
    """Stream worker to instance: the panel raised."""

    work: Work
    panel: Panel
    error: str
    at_fault: bool
    """The request is at fault (a bad value), not the machine."""
    device_lost: bool = False
    """Nothing can be computed on this device any more: the process has to start anew."""
    certain: bool = False
    """It would fail in the same way again, through no fault of the request."""


class PanelCancelled(Message):
    """Stream worker to instance: stopped as told."""

    work: Work


class StageState(Message):
    """Instance to transfer: put the workspace's values into a slot."""

    work: Work
    deadline: float
    """Until when a full pool is waited for, in seconds of this host's monotonic clock."""


class StateStaged(Message):
    """Transfer to instance: sealed."""

    work: Work
    staged: Staged
    seconds: Seconds


class LoadState(Message):
    """Instance to transfer: fetch, verify and load staged tensors into the workspace."""

    work: Work
    source: Staged
    target: LeaseRef | None
    """Where bytes of another pool go; the transfer actor gives it back in any case."""
    deadline: float
    """Until when a pool that is away is waited for, in seconds of this host's monotonic clock."""


class StateLoaded(Message):
    """Transfer to instance: the values are in the workspace."""

    work: Work
    seconds: Seconds


class StateFailed(Message):
    """Transfer to instance: staging or loading failed; the workspace is unchanged."""

    work: Work
    reason: str
    source_gone: bool = False
    """The staged tensors are lost or damaged, so that nobody could load them."""
    retryable: bool = True
    """False when it would fail anywhere: values that cannot cross, or more than a pool can ever hold."""


class CancelState(Message):
    """Instance to transfer: end what is being done for this work where it can be ended.

    Answered by whatever it came to, StateFailed if it came to nothing.
    """

    work: Work


class SaveArtifact(Message):
    """Instance to transfer: write the workspace's picture to the artifact store."""

    work: Work
    output: Output
    deadline: float
    """Until when a full disk is waited for, in seconds of this host's monotonic clock."""


class ArtifactSaved(Message):
    """Transfer to instance: the file is complete and on disk."""

    work: Work
    artifact: Artifact
