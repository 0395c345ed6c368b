"""Messages inside one role process: its instance, stream worker and transfer actor pass attempts to each other.

    encoder     instance -> RunStage -> stream worker -> StoreOutputs -> transfer -> report -> instance
    denoiser    instance -> LoadInputs -> transfer -> RunStage -> stream worker -> StoreOutputs -> transfer -> ...
    decoder     instance -> LoadInputs -> transfer -> RunStage -> stream worker -> SaveArtifact -> transfer -> ...

An encoder on a host that lacks the uploads begins with FetchUploads -> transfer -> RunStage. The report that ends an
attempt is the message that the head receives, of `roles.messages.stages`. Messages contain no
tensors: they name the attempt, and the values are in its `ActiveAttempt`.
"""

from __future__ import annotations

from triptych.bus import Message
from triptych.engines.stages import Stage
from triptych.roles.messages.common import Attempt, LeaseRef, Output, Provenance, StoredPayload, Upload


class LoadInputs(Message):
    """To the transfer actor: fetch, verify and load stored tensors."""

    attempt: Attempt
    source: StoredPayload
    target: LeaseRef | None
    """Block for bytes of another pool; the transfer actor releases it in any case."""
    deadline: float
    """End of the wait for a pool that has ended, in seconds of this host's monotonic clock."""
    checkpoint: StoredPayload | None = None
    """What an earlier attempt has made so far; left out if it cannot be loaded."""


class FetchUploads(Message):
    """To the transfer actor: have the uploads that the attempt's inputs refer to on this host."""

    attempt: Attempt
    uploads: tuple[Upload, ...]
    deadline: float
    """End of the wait for a store that does not answer, in seconds of this host's monotonic clock."""


class RunStage(Message):
    """To the stream worker: run this stage on the attempt's values."""

    attempt: Attempt
    stage: Stage


class StoreOutputs(Message):
    """To the transfer actor: put the attempt's values into a block."""

    attempt: Attempt
    deadline: float
    """End of the wait for a full pool, in seconds of this host's monotonic clock."""


class StoreCheckpoint(Message):
    """To the transfer actor: put the attempt's snapshot into a block, if there is one free, while the stage goes on."""

    attempt: Attempt
    returns: bool = False
    """Whether the attempt ends with this: it has been stopped so that another instance takes it."""


class StorePreview(Message):
    """To the transfer actor: put `AttemptTracker.previews[preview]` into a block if there is one now."""

    preview: Attempt
    """Of `roles.previews.preview_attempt`."""


class SaveArtifact(Message):
    """To the transfer actor: write the attempt's image or video to the artifact store."""

    attempt: Attempt
    output: Output
    deadline: float
    """End of the wait for a full disk or a store that does not answer, in seconds of this host's monotonic clock."""
    provenance: Provenance | None = None
    """What the file is made from; None for a file without metadata."""


class CancelAttempt(Message):
    """To the actor that has the attempt: end it as soon as possible, before the next step or while it waits."""

    attempt: Attempt


class SetWeightsLoaded(Message):
    """To the stream worker: load or release the weights. InstanceWakeChanged follows."""

    awake: bool


class DeviceLost(Message):
    """To the instance: the device cannot be used any more, so the process has to restart."""

    error: str
