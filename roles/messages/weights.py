"""What `triptych reload`, `sleep` and `wake` ask of the head: which weights of a model are in memory."""

from __future__ import annotations

from triptych.bus import Message


class ReloadModel(Message):
    """Go over to a model's files as they are on disk now. Answered with `Reloading`; ask again to see what is left."""

    model: str = ""
    """Name of the model; "" for all."""


class Reloading(Message):
    """Instances restart one by one, each when no work that began with the earlier weights needs it."""

    model: str
    """Version of the weights to go over to, of `engines.weights.model_version`."""
    instances: tuple[str, ...]
    """Those that still have other weights, or are restarting; empty when it is done."""
    joined: int
    """Instances that have joined the head with the weights that are on disk."""
    total: int
    """Instances that the topology has."""


class SleepModel(Message):
    """Let a model sleep as soon as it is idle. Answered with `ModelStatus`; refused with `sleep = "never"`."""

    model: str
    """Its name."""
    begins: bool = True
    """False to ask for its status alone."""


class WakeModel(Message):
    """Wake a model. Answered with `ModelStatus`; ask again to see how far it is."""

    model: str
    """Its name."""


class ModelStatus(Message):
    """Whether the weights of a model are in memory."""

    model: str
    """Its name."""
    state: str
    """"starting", "loaded", "asleep" or "waking"."""
    weights: int
    """Bytes of its weights that are in memory."""
    trouble: str
    """Why it cannot be woken now, "" if nothing prevents it."""
