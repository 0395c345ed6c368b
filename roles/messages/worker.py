"""Inside one role process: the instance, its stream worker and its transfer actor pass attempts on to each other.

    encoder     instance -> RunStage -> stream worker -> StoreOutputs -> transfer -> report -> instance
    denoiser    instance -> LoadInputs -> transfer -> RunStage -> stream worker -> StoreOutputs -> transfer -> ...
    decoder     instance -> LoadInputs -> transfer -> RunStage -> stream worker -> SaveArtifact -> transfer -> ...

The report that ends an attempt is the very message that the head takes, of `roles.messages.stages`. Tensors never ride
in a message: these name the attempt, and the values lie in the process's `ActiveAttempt`.
"""

from __future__ import annotations

from triptych.bus import Message
from triptych.engines.stages import Stage
from triptych.roles.messages.common import Attempt, LeaseRef, Output, StoredPayload


class LoadInputs(Message):
    """To the transfer actor: fetch, verify and load stored tensors."""

    attempt: Attempt
    source: StoredPayload
    target: LeaseRef | None
    """Where bytes of another pool go; the transfer actor gives it back in any case."""
    deadline: float
    """Until when a pool that is away is waited for, in seconds of this host's monotonic clock."""


class RunStage(Message):
    """To the stream worker: run this stage on the attempt's values."""

    attempt: Attempt
    stage: Stage


class StoreOutputs(Message):
    """To the transfer actor: put the attempt's values into a block."""

    attempt: Attempt
    deadline: float
    """Until when a full pool is waited for, in seconds of this host's monotonic clock."""


class SaveArtifact(Message):
    """To the transfer actor: write the attempt's image or video to the artifact store."""

    attempt: Attempt
    output: Output
    deadline: float
    """Until when a full disk is waited for, in seconds of this host's monotonic clock."""


class CancelAttempt(Message):
    """To whichever actor has the attempt: end it where it can be ended, before the next step or while it waits."""

    attempt: Attempt


class SetWeightsLoaded(Message):
    """To the stream worker: bring the weights into memory, or let go of them. Ends in InstanceWakeChanged."""

    awake: bool


class DeviceLost(Message):
    """To the instance: nothing can be computed on the device any more, so the process has to start anew."""

    error: str
