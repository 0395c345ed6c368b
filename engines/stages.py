"""The names of the three stages, and the error that says why a model cannot be served. Imports no torch."""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """One of the stages of a diffusion pipeline, in the order that a request visits them."""

    ENCODER = "encoder"
    DENOISER = "denoiser"
    DECODER = "decoder"


class ModelError(Exception):
    """A model folder that cannot be served; `str()` is one sentence that says what to do about it."""


class InputError(ValueError):
    """A request names an input that the pipeline does not take, or gives one a value that it cannot have."""
