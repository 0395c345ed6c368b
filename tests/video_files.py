"""Small videos, as clients send them and as decoders make them."""

from __future__ import annotations

import functools
import io

import av
import numpy as np
from PIL import Image

COLOURS = ((200, 30, 40), (30, 160, 60), (40, 60, 200))
"""Of the frames, in turn."""


@functools.cache
def film(
    frames: int = 3,
    size: tuple[int, int] = (32, 16),
    *,
    container: str = "mp4",
    codec: str = "libx264",
    sound: bool = False,
) -> bytes:
    """A video of plain frames, at 16 a second."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as made:
        stream = made.add_stream(codec, rate=16)
        stream.width, stream.height = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        heard = made.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for k in range(frames):
            made.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", size, COLOURS[k % len(COLOURS)]))))
        made.mux(stream.encode(None))
        if heard is not None:
            quiet = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            quiet.sample_rate, quiet.pts = 16_000, 0
            made.mux(heard.encode(quiet))
            made.mux(heard.encode(None))
    return file.getvalue()


def turned(data: bytes) -> bytes:
    """The MP4 with a matrix that turns its frames by 90 degrees clockwise, as telephones write it."""
    at = data.index(b"tkhd") + 4 + 40  # version and flags, times, id, duration, layer, group, volume
    one = (1 << 16).to_bytes(4, "big")
    minus, zero, last = (0x1_0000_0000 - (1 << 16)).to_bytes(4, "big"), bytes(4), (1 << 30).to_bytes(4, "big")
    matrix = zero + one + zero + minus + zero + zero + zero + zero + last
    return data[:at] + matrix + data[at + 36 :]
