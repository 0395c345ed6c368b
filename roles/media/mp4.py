"""Write MP4 files: H.264, with an AAC track where there is sound (docs/adr/0013).

The same frames and samples always give the same bytes: one thread, fixed settings, no dates and no program's name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Final, TypeAlias

import av
import numpy as np
import numpy.typing as npt
from av.audio.resampler import AudioResampler
from av.audio.stream import AudioStream
from av.codec.context import Flags
from av.packet import Packet
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from triptych.roles.media.decoded import Audio, Check, VideoFrames
from triptych.roles.media.metadata import mp4_tags
from triptych.roles.media.writers import WriteOptions

_Packet: TypeAlias = "Packet[VideoStream] | Packet[AudioStream]"

_X264: Final = {"preset": "medium", "crf": "17", "threads": "1"}
"""At crf 17 the loss is hardly visible."""
_MP4: Final = {"movflags": "+faststart", "fflags": "+bitexact"}
_BT709: Final = 1
_SCALE: Final = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_SAMPLES: Final = 1024
"""Of one frame of AAC."""
_BITS_PER_CHANNEL: Final = 128_000
_BITS_PER_SAMPLE: Final = 4
"""At most: the codec allows six."""
_NTSC: Final = Fraction(1000, 1001)


def write_mp4(video: VideoFrames, options: WriteOptions) -> bytes:
    """Write a video that a browser can play while it arrives.

    H.264 in yuv420p (BT.709, limited range) needs even sizes: an odd height or width is made even by repeating the
    last row or column. The sound keeps its length and, where AAC knows it, its rate; else it gets the next higher one
    that AAC knows, at most 96 kHz.

    Args:
        video: What to encode.
        options: A rate of 29.97 or its like stands for the fraction of NTSC.
    """
    # The index is moved to the front at the end, for which the file is read again: it needs a name, but no disk.
    descriptor = os.memfd_create("mp4")
    try:
        path = f"/proc/self/fd/{descriptor}"
        pace = exact_rate(options.fps)
        with av.open(path, "w", format="mp4", options=_MP4 | {"movie_timescale": _timescale(pace)}) as container:
            if options.metadata is not None:
                container.metadata.update(mp4_tags(options.metadata))
            stream = container.add_stream("libx264", rate=pace)
            packets: list[_Packet] = [*_video_packets(stream, video.frames, options.check)]
            if video.sound is not None:
                rate = _aac_rate(video.sound.rate)
                packets += _sound_packets(container.add_stream("aac", rate=rate), video.sound, rate)
            # A player needs both of them at the same time.
            for packet in sorted(packets, key=_when):
                container.mux(packet)
        return Path(path).read_bytes()
    finally:
        os.close(descriptor)


def exact_rate(fps: float) -> Fraction:
    """Return frames per second as the exact fraction: 29.97 is 30000/1001."""
    ntsc = ceil(fps) * _NTSC
    if fps != ceil(fps) and abs(fps - ntsc) < 0.005:
        return ntsc
    return Fraction(fps).limit_denominator(1001)


def _timescale(pace: Fraction) -> str:
    # In which a file says how long its tracks are: so that no part of a frame is lost, and little of the sound.
    return str(pace.numerator if pace.numerator >= 10_000 else 1000 * pace.numerator)


def _when(packet: _Packet) -> Fraction:
    if packet.dts is None or packet.time_base is None:
        raise RuntimeError("an encoder made a packet without a time")
    return packet.dts * packet.time_base


def _video_packets(stream: VideoStream, frames: npt.NDArray[np.uint8], check: Check) -> Iterator[_Packet]:
    count, height, width, _ = frames.shape
    odd = ((0, height % 2), (0, width % 2), (0, 0))
    context = stream.codec_context
    stream.height, stream.width, stream.pix_fmt = height + odd[0][1], width + odd[1][1], "yuv420p"
    stream.options = dict(_X264)
    context.thread_count = 1
    context.flags |= Flags.bitexact
    context.color_range = int(ColorRange.MPEG)
    context.colorspace = context.color_primaries = context.color_trc = _BT709
    reformatter = VideoReformatter()
    for number in range(count):
        check()
        frame = av.VideoFrame.from_ndarray(np.pad(frames[number], odd, mode="edge"), format="rgb24")
        frame = reformatter.reformat(
            frame,
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=_SCALE,
            threads=1,
        )
        frame.pts = number
        yield from stream.encode(frame)
    yield from stream.encode(None)


def _sound_packets(stream: AudioStream, sound: Audio, rate: int) -> Iterator[_Packet]:
    channels = len(sound.samples)
    layout = "mono" if channels == 1 else "stereo"
    stream.layout = layout
    stream.bit_rate = channels * min(_BITS_PER_CHANNEL, _BITS_PER_SAMPLE * rate)
    stream.codec_context.flags |= Flags.bitexact
    resampler = AudioResampler(format="fltp", layout=layout, rate=rate, frame_size=_SAMPLES)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound.samples), format="fltp", layout=layout)
    frame.sample_rate, frame.time_base, frame.pts = sound.rate, Fraction(1, sound.rate), 0
    for part in (frame, None):
        for ready in resampler.resample(part):
            yield from stream.encode(ready)
    yield from stream.encode(None)


def _aac_rate(rate: int) -> int:
    known = av.Codec("aac", "w").audio_rates or [rate]
    return min((other for other in known if other >= rate), default=max(known))
