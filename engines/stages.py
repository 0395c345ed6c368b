"""The three stages of a pipeline, and the errors of models and inputs. Imports no torch."""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """A stage of a diffusion pipeline, in the order of a request."""

    ENCODER = "encoder"
    DENOISER = "denoiser"
    DECODER = "decoder"


class ModelError(Exception):
    """A model cannot be served; the message says what to do."""


class InputError(ValueError):
    """A request has an input that the pipeline does not take, or a value that it cannot have."""


def one_line(error: BaseException) -> str:
    """Return the text of an error as one line of at most 500 characters."""
    return " ".join(str(error).split())[:500]
