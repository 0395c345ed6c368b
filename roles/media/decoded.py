"""Convert what a decoder returns to media that a file can hold: images, a video, sound, latents."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from triptych.engines.parameters.media import IMAGES, LATENTS, NSFW, SAMPLING_RATE, SOUNDS, VIDEOS

Check: TypeAlias = Callable[[], None]
"""Called between two frames; it raises to stop the conversion."""
_MOST_CHANNELS: Final = 2


class MediaError(Exception):
    """The decoder's results cannot be converted to media, or a format cannot hold them."""


@dataclass(frozen=True, slots=True)
class Stills:
    """One image, or several in order, such as the layers of one."""

    images: Sequence[Image.Image]


@dataclass(frozen=True, slots=True)
class Audio:
    """A waveform."""

    samples: npt.NDArray[np.float32]
    """[channels, samples] in -1..1; one channel or two."""
    rate: int
    """Samples per second."""


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """Frames, and the sound that goes with them."""

    frames: npt.NDArray[np.uint8]
    """[frames, height, width, 3], red, green, blue."""
    sound: Audio | None = None


@dataclass(frozen=True, slots=True)
class Latents:
    """Tensors that were not decoded."""

    tensors: Mapping[str, torch.Tensor]
    """By name, on the CPU, of any shape and dtype."""


Media: TypeAlias = Stills | VideoFrames | Audio | Latents


def to_media(values: Mapping[str, object], check: Check = lambda: None) -> Media:
    """Find what a decoder made among its results.

    Args:
        values: By name, None for what there is not. Of "images" one image or several, of one batch; of "videos" one,
            as images, or as an array [frames, height, width, 3] of uint8 or of floats in 0..1, with or without a
            batch of one around it; of "audio" one, floats in -1..1, [channels, samples] or [samples] likewise, with
            its "sampling_rate". Floats that are out of these ranges are clipped.
            Tensors that are latents stay as they are.
        check: Called before each frame.

    Raises:
        MediaError: There is nothing, or more than one medium, or one of another shape or with values that are no
            numbers.
    """
    made = {name: value for name, value in values.items() if value is not None}
    rate = made.pop(SAMPLING_RATE, None)
    made.pop(NSFW, None)
    latents = {name: value for name, value in made.items() if isinstance(value, torch.Tensor) and name in LATENTS}
    if latents and len(latents) == len(made):
        return Latents({name: value.detach().cpu().contiguous() for name, value in latents.items()})
    match sorted((_kind(name), name) for name in made):
        case [("image", name)]:
            return Stills(_images(made[name]))
        case [("video", name)]:
            return VideoFrames(_frames(made[name], check))
        case [("sound", name)]:
            return _sound(made[name], rate)
        case [("sound", heard), ("video", seen)]:
            return VideoFrames(_frames(made[seen], check), _sound(made[heard], rate))
    raise MediaError(
        f"the decoder made {' and '.join(sorted(made)) or 'nothing'}: one image, video or sound is expected"
    )


def nsfw_flag(values: Mapping[str, object]) -> bool | None:
    """Return whether the safety checker of a pipeline has found something; None without a checker."""
    found = values.get(NSFW)
    return any(found) if isinstance(found, (list, tuple)) else None


def _kind(name: str) -> str:
    kinds = {"image": IMAGES, "video": VIDEOS, "sound": SOUNDS}
    return next((kind for kind, names in kinds.items() if name in names), "")


def _images(value: object) -> list[Image.Image]:
    batch = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(batch) == 1 and isinstance(batch[0], (list, tuple)):
        batch = list(batch[0])  # of layers
    images = [image for image in batch if isinstance(image, Image.Image)]
    if not batch or len(images) < len(batch):
        raise MediaError("the decoder made images that are no images")
    return images


def _frames(value: object, check: Check) -> npt.NDArray[np.uint8]:
    frames = _one_video(value)
    if not len(frames):
        raise MediaError("the decoder made a video of no frames")
    first = _pixels(frames[0], 0)
    pixels = np.empty((len(frames), *first.shape), np.uint8)
    # Frame by frame, so that a long video is never there twice as floats.
    for number, frame in enumerate(frames):
        check()
        one = _pixels(frame, number)
        if one.shape != first.shape:
            raise MediaError(f"the decoder made frames of shapes {first.shape} and {one.shape}")
        pixels[number] = one
    return pixels


def _one_video(value: Any) -> Any:
    """Remove the batch dimension; returns a sequence or array of frames."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.float().numpy() if value.is_floating_point() else value.numpy()
    if isinstance(value, np.ndarray):
        if value.ndim == 5 and len(value) == 1:
            value = value[0]
        if value.ndim != 4:
            raise MediaError(f"the decoder made videos of shape {value.shape}, not [1, frames, height, width, 3]")
        return value
    if not isinstance(value, (list, tuple)):
        raise MediaError(f"the decoder made a video that is a {type(value).__name__}")
    if len(value) == 1 and (isinstance(value[0], (list, tuple)) or getattr(value[0], "ndim", 0) >= 4):
        return _one_video(value[0])
    return value


def _pixels(frame: Any, number: int) -> npt.NDArray[np.uint8]:
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    pixels = np.asarray(frame)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise MediaError(f"the decoder made a frame of shape {pixels.shape}, not [height, width, 3]")
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating):
        raise MediaError(f"the decoder made frames of {pixels.dtype}, not of floats or uint8")
    pixels = pixels.astype(np.float32)
    if not np.isfinite(pixels).all():
        raise MediaError(f"frame {number} of the video has values that are no numbers")
    clipped: npt.NDArray[np.float32] = np.clip(np.rint(pixels * 255), 0, 255)
    return clipped.astype(np.uint8)


def _sound(value: object, rate: object) -> Audio:
    if isinstance(rate, bool) or not isinstance(rate, int) or rate < 1:
        raise MediaError(f"the decoder made sound, and its samples per second are {rate or 'not known'}")
    samples = _waveform(value)
    if not np.isfinite(samples).all():
        raise MediaError("the sound has values that are no numbers")
    return Audio(np.clip(samples, -1, 1), rate)


def _waveform(value: Any) -> npt.NDArray[np.float32]:
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, torch.Tensor):
        value = value.detach().float().cpu().numpy()
    samples = np.asarray(value)
    if not np.issubdtype(samples.dtype, np.floating):
        raise MediaError(f"the decoder made sound of {samples.dtype}, not of floats")
    shape = samples.shape
    if samples.ndim == 3 and len(samples) == 1:
        samples = samples[0]
    if samples.ndim == 1:
        samples = samples[None]
    if samples.ndim != 2 or len(samples) not in range(1, _MOST_CHANNELS + 1) or not samples.size:
        raise MediaError(f"the decoder made sound of shape {shape}, not [1, channels, samples] of one or two channels")
    return samples.astype(np.float32)
