"""Inside one role process: the instance, its stream worker and its transfer actor.

Tensors never ride in a message: these name the attempt, and the values lie in the process's `Workspace`.
"""

from __future__ import annotations

from triptych.bus import Message
from triptych.engines.stages import Stage
from triptych.roles.messages.common import Artifact, Attempt, LeaseRef, Natural, Output, Seconds, StoredPayload


class RunStage(Message):
    """Instance to stream worker: run this stage on the workspace's values."""

    attempt: Attempt
    stage: Stage


class CancelRun(Message):
    """Instance to stream worker: stop before the next step."""

    attempt: Attempt


class SetWeightsLoaded(Message):
    """Instance to stream worker: bring the weights into memory, or let go of them."""

    awake: bool


class WeightsLoadedChanged(Message):
    """Stream worker to instance: that is done, or could not be."""

    awake: bool
    """Whether the weights are in memory now."""
    seconds: Seconds
    trouble: str = ""
    """Why they are not, where they should be."""


class RunStarted(Message):
    """Stream worker to instance."""

    attempt: Attempt
    stage: Stage


class RunStepped(Message):
    """Stream worker to instance: a denoising step is done."""

    attempt: Attempt
    step: Natural
    total_steps: Natural


class RunFinished(Message):
    """Stream worker to instance: the outputs are in the workspace."""

    attempt: Attempt
    stage: Stage
    seconds: Seconds
    seed_independent: bool = False
    """The outputs of an encoder are the same for every seed, but for the generator among them."""


class RunFailed(Message):
    """Stream worker to instance: the stage raised."""

    attempt: Attempt
    stage: Stage
    error: str
    invalid_request: bool
    """The request is at fault (a bad value), not the machine."""
    device_lost: bool = False
    """Nothing can be computed on this device any more: the process has to start anew."""
    deterministic: bool = False
    """It would fail in the same way again, through no fault of the request."""


class RunCancelled(Message):
    """Stream worker to instance: stopped as told."""

    attempt: Attempt


class StoreOutputs(Message):
    """Instance to transfer: put the workspace's values into a block."""

    attempt: Attempt
    deadline: float
    """Until when a full pool is waited for, in seconds of this host's monotonic clock."""


class OutputsStored(Message):
    """Transfer to instance: sealed."""

    attempt: Attempt
    stored: StoredPayload
    seconds: Seconds


class LoadInputs(Message):
    """Instance to transfer: fetch, verify and load stored tensors into the workspace."""

    attempt: Attempt
    source: StoredPayload
    target: LeaseRef | None
    """Where bytes of another pool go; the transfer actor gives it back in any case."""
    deadline: float
    """Until when a pool that is away is waited for, in seconds of this host's monotonic clock."""


class InputsLoaded(Message):
    """Transfer to instance: the values are in the workspace."""

    attempt: Attempt
    seconds: Seconds


class TransferTaskFailed(Message):
    """Transfer to instance: storing or loading failed; the workspace is unchanged."""

    attempt: Attempt
    reason: str
    source_gone: bool = False
    """The stored tensors are lost or damaged, so that nobody could load them."""
    retryable: bool = True
    """False when it would fail anywhere: values that cannot cross, or more than a pool can ever hold."""


class CancelTransferTask(Message):
    """Instance to transfer: end what is being done for this attempt where it can be ended.

    Answered by whatever it came to, TransferTaskFailed if it came to nothing.
    """

    attempt: Attempt


class SaveArtifact(Message):
    """Instance to transfer: write the workspace's image to the artifact store."""

    attempt: Attempt
    output: Output
    deadline: float
    """Until when a full disk is waited for, in seconds of this host's monotonic clock."""


class ArtifactSaved(Message):
    """Transfer to instance: the file is complete and on disk."""

    attempt: Attempt
    artifact: Artifact
