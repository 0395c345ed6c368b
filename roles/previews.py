"""Partial images: at which steps a denoiser makes them, and how they are called. Pure.

A preview has an attempt of its own, so that a decoder takes it as it takes any job, and the pool and the artifact store
tell it from the image of its job: `REQUEST/INDEX.STEP`, in the file `REQUEST_INDEX.STEP.png`.
"""

from __future__ import annotations

from typing import Final

from triptych.roles.messages.common import Attempt

_SEPARATOR: Final = "."


def preview_steps(total_steps: int, count: int) -> tuple[int, ...]:
    """Return the steps after which `count` previews are made, at equal distances; never the last step.

    Fewer where there are too few steps.
    """
    wanted = (round(total_steps * number / (count + 1)) for number in range(1, count + 1))
    return tuple(dict.fromkeys(step for step in wanted if 0 < step < total_steps))


def preview_attempt(attempt: Attempt, step: int) -> Attempt:
    """Return the attempt that stores and decodes the preview after a step of a denoise."""
    return Attempt(preview_id(attempt.job_id, step), attempt.number)


def preview_id(job_id: str, step: int) -> str:
    """Return the id of the preview of a job after a step."""
    return f"{job_id}{_SEPARATOR}{step}"


def is_preview(attempt: Attempt) -> bool:
    """Return whether an attempt is of a preview, not of a job."""
    return denoise_of(attempt)[1] > 0


def denoise_of(attempt: Attempt) -> tuple[Attempt, int]:
    """Return the denoise that a preview is of, and its step; an attempt of a job itself, with 0."""
    job_id, _, step = attempt.job_id.partition(_SEPARATOR)
    return (Attempt(job_id, attempt.number), int(step)) if step.isdecimal() and step.isascii() else (attempt, 0)
