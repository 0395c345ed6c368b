"""Messages of `triptych reload`, `sleep` and `wake` to the head: which weights of a model are in memory."""

from __future__ import annotations

from triptych.bus import Message


class ReloadModel(Message):
    """Change to the weights of a model that are on disk now. Answered with `Reloading`; repeat to see what is left."""

    model: str = ""
    """Name of the model; "" for all."""


class Reloading(Message):
    """Instances restart one by one, each when no job with the earlier weights needs it."""

    model: str
    """Version of the new weights, of `engines.weights.model_version`."""
    instances: tuple[str, ...]
    """Those that still have other weights, or are restarting; empty when all have changed."""
    joined: int
    """Number of registered instances with the weights that are on disk."""
    total: int
    """Number of instances in the topology."""


class SleepModel(Message):
    """Let a model sleep as soon as it is idle. Answered with `ModelStatus`; refused with `sleep = "never"`."""

    model: str
    """Its name."""
    begins: bool = True
    """False to only ask for its status."""


class WakeModel(Message):
    """Wake a model. Answered with `ModelStatus`; repeat to see its progress."""

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
    """Why it cannot be woken now; "" if it can."""
