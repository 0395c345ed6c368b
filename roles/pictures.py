"""From what a decoder returns to the pictures of an artifact."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from PIL import Image

from roles.artifacts import ArtifactError

MEDIA = ("images", "videos")


def pictures(values: Mapping[str, object]) -> list[Image.Image]:
    """Find the one picture, or the frames of the one video, among a decoder's results.

    Args:
        values: "images", a list of one `PIL.Image.Image`; or "videos", floats in 0..1 or uint8, shape
            [1, frames, height, width, 3].

    Raises:
        ArtifactError: there is none, more than one, or something beside it that no format here can hold.

    """
    found = [name for name in MEDIA if values.get(name) is not None]
    others = sorted(name for name, value in values.items() if name not in MEDIA and value is not None)
    if len(found) != 1 or others:
        raise ArtifactError(
            f"the decoder made {', '.join(found + others) or 'nothing'}: one picture or video is expected"
        )
    batch = values[found[0]]
    if found[0] == "videos":
        return _frames(np.asarray(batch))
    if not isinstance(batch, list) or len(batch) != 1 or not isinstance(batch[0], Image.Image):
        raise ArtifactError("the decoder made something else than one picture")
    return batch


def _frames(videos: np.ndarray) -> list[Image.Image]:
    if videos.ndim != 5 or videos.shape[0] != 1 or videos.shape[-1] != 3:
        raise ArtifactError(f"the decoder made videos of shape {videos.shape}, not of [1, frames, height, width, 3]")
    if videos.dtype != np.uint8:
        videos = np.clip(np.rint(videos.astype(np.float32) * 255), 0, 255).astype(np.uint8)
    return [Image.fromarray(frame) for frame in videos[0]]
