"""Every MP4 is opened again: what a player would see in it, and how far that is from what went in."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
import pytest

from triptych.roles.media.decoded import Audio, VideoFrames
from triptych.roles.media.mp4 import exact_rate
from triptych.roles.media.writers import encode


def smooth(frames: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Slowly changing colours, [frames, height, width, 3]."""
    k, y, x = np.mgrid[0:frames, 0:height, 0:width]
    red, green = 40 + 160 * x / width + k, 220 - 180 * y / height
    return np.stack([red, green, 128 + 60 * np.sin((x + y) / 40 + k / 9)], -1).clip(0, 255).astype(np.uint8)


def tone(channels: int, seconds: float, rate: int) -> Audio:
    times = np.arange(round(seconds * rate)) / rate
    pitches = (440.0, 660.0)[:channels]
    return Audio(np.stack([0.5 * np.sin(2 * np.pi * pitch * times) for pitch in pitches]).astype(np.float32), rate)


@dataclass
class Probe:
    """What FFmpeg finds in a file."""

    video: Any
    audio: Any
    frames: np.ndarray[Any, np.dtype[np.uint8]]
    samples: np.ndarray[Any, np.dtype[np.float32]] | None
    metadata: dict[str, str]


def probe(data: bytes) -> Probe:
    with av.open(io.BytesIO(data)) as container:
        streams = container.streams
        assert len(streams) == len(streams.video) + len(streams.audio)
        assert len(streams.video) == 1
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        video, audio, samples = streams.video[0], None, None
        metadata = {**container.metadata, **video.metadata}
        if streams.audio:
            (audio,) = streams.audio
            container.seek(0)
            samples = np.concatenate([frame.to_ndarray() for frame in container.decode(audio)], axis=1)
            metadata |= audio.metadata
        return Probe(video, audio, frames, samples, metadata)


def psnr(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    error = np.square(one.astype(np.float64) - other).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(12, 48, 64), (1, 48, 64), (5, 33, 48), (5, 32, 47), (3, 49, 49), (2, 1, 1)]
)
def test_a_video_is_h264_of_every_frame_and_looks_like_its_source(frames: int, height: int, width: int) -> None:
    source = smooth(frames, height, width)
    found = probe(encode(VideoFrames(source), "mp4", 16.0))
    video, context = found.video, found.video.codec_context
    assert (context.name, context.pix_fmt, video.average_rate, video.frames) == ("h264", "yuv420p", 16, frames)
    assert (video.height, video.width) == (height + height % 2, width + width % 2)
    assert video.duration * video.time_base == Fraction(frames, 16)
    assert (context.color_range, context.colorspace, context.color_primaries, context.color_trc) == (1, 1, 1, 1)
    assert found.audio is None
    assert psnr(found.frames[:, :height, :width], source) > 35
    padded = np.pad(source, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    assert psnr(found.frames, padded) > 35, "an odd edge is repeated"


@pytest.mark.parametrize("colour", [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (250, 180, 20)])
def test_colours_are_those_of_the_source(colour: tuple[int, int, int]) -> None:
    source = np.broadcast_to(np.array(colour, np.uint8), (3, 32, 32, 3))
    found = probe(encode(VideoFrames(np.ascontiguousarray(source)), "mp4", 24.0))
    assert np.abs(found.frames.astype(int) - colour).max() <= 3


@pytest.mark.parametrize(
    ("fps", "exact"),
    [
        (16.0, Fraction(16)),
        (23.976, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (30000 / 1001, Fraction(30000, 1001)),
        (7.5, Fraction(15, 2)),
        (12.34, Fraction(617, 50)),
        (1.0, Fraction(1)),
        (240.0, Fraction(240)),
    ],
)
def test_a_frame_rate_is_an_exact_fraction(fps: float, exact: Fraction) -> None:
    assert exact_rate(fps) == exact
    found = probe(encode(VideoFrames(smooth(4, 16, 16)), "mp4", fps)).video
    assert found.average_rate == exact
    assert found.duration * found.time_base == 4 / exact


@pytest.mark.parametrize(
    ("channels", "rate", "played"),
    [(2, 24000, 24000), (1, 16000, 16000), (2, 44100, 44100), (2, 96000, 96000), (2, 20000, 22050), (1, 192000, 96000)],
)
def test_the_sound_track_has_the_length_the_rate_and_the_waves_of_the_sound(
    channels: int, rate: int, played: int
) -> None:
    found = probe(encode(VideoFrames(smooth(8, 16, 16), tone(channels, 0.75, rate)), "mp4", 16.0))
    audio = found.audio
    assert (audio.codec_context.name, audio.rate, audio.channels) == ("aac", played, channels)
    assert audio.duration * audio.time_base == pytest.approx(0.75, abs=1e-4)
    assert found.video.duration * found.video.time_base == Fraction(1, 2), "neither is cut to the other"
    assert found.samples is not None
    expected = tone(channels, 0.75, played).samples
    middle = slice(played // 10, played // 2)
    error = np.square(found.samples[:, middle] - expected[:, middle]).mean()
    assert 10 * np.log10(0.125 / error) > 20


@pytest.mark.parametrize("samples", [100, 1024, 1025])
def test_a_very_short_sound_is_a_track_as_well(samples: int) -> None:
    sound = Audio(np.zeros((1, samples), np.float32), 48000)
    found = probe(encode(VideoFrames(smooth(2, 16, 16), sound), "mp4", 16.0))
    assert found.audio.duration * found.audio.time_base == pytest.approx(samples / 48000, abs=1e-4)


def test_a_file_plays_while_it_arrives_and_says_nothing_of_when_it_was_made() -> None:
    media = VideoFrames(smooth(20, 32, 32), tone(2, 1.25, 48000))
    data = encode(media, "mp4", 16.0)
    assert data.index(b"moov") < data.index(b"mdat")
    found = probe(data)
    assert not {"creation_time", "encoder"} & found.metadata.keys()
    # Both are there from the start, not one after the other.
    with av.open(io.BytesIO(data)) as container:
        kinds = [packet.stream.type for packet in container.demux() if packet.size]
    assert set(kinds[:4]) == {"audio", "video"}
