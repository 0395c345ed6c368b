"""Videos of clients: which are read, what becomes of their frames, and what is refused."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.video_files import COLOURS, film, turned
from triptych.roles.media import video_input
from triptych.roles.media.video_input import (
    _LENGTH,
    DEMUXERS,
    VideoInfo,
    VideoInputError,
    VideoLimits,
    _frames,
    _upright,
    check_video,
    read_video,
    video_ending,
)


def frames(data: bytes, **limits: int) -> list[Image.Image]:
    """As the child reads them, without a child."""
    return [_upright(frame) for frame in _frames(io.BytesIO(data), DEMUXERS[video_ending(data)], VideoLimits(**limits))]


def plain(images: list[Image.Image]) -> list[np.ndarray]:
    return [np.asarray(image).mean(axis=(0, 1)) for image in images]


@pytest.mark.parametrize(
    ("container", "codec", "ending"),
    [
        ("mp4", "libx264", "mp4"),
        ("mov", "mpeg4", "mp4"),
        ("webm", "libvpx-vp9", "webm"),
        ("matroska", "libx264", "webm"),
    ],
)
def test_containers_are_known_by_content_and_their_frames_are_read(container: str, codec: str, ending: str) -> None:
    data = film(4, container=container, codec=codec)
    assert video_ending(data) == ending
    found = frames(data)
    assert {image.size for image in found} == {(32, 16)}
    np.testing.assert_allclose(plain(found), [*COLOURS, COLOURS[0]], atol=12)


def test_sound_beside_the_frames_is_ignored() -> None:
    assert len(frames(film(sound=True))) == 3


def test_frames_are_turned_upright() -> None:
    (image,) = frames(turned(film(1)))
    assert image.size == (16, 32)


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"frames": 2}, "at most 2 frames"),
        ({"frame_pixels": 500}, "at most 500 pixels in a frame"),
        ({"pixels": 1000}, "at most 1000 pixels in all its frames together"),
    ],
)
def test_what_is_beyond_a_limit_is_refused(limits: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        frames(film(3), **limits)
    assert len(frames(film(2), frames=2, frame_pixels=512, pixels=1024)) == 2


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (film(container="mov", codec="mjpeg"), "unsupported", "is mjpeg: send one of av1, h264"),
        (film(0, sound=True), "damaged", "has no video"),
    ],
    ids=["another codec", "sound alone"],
)
def test_what_is_no_video_that_is_taken(data: bytes, code: str, words: str) -> None:
    with pytest.raises(VideoInputError, match=words) as refused:
        frames(data)
    assert refused.value.code == code


def test_a_child_reads_the_frames_and_its_errors_are_ours() -> None:
    data = film(3)
    assert check_video(data, VideoLimits()) == VideoInfo(3, 32, 16)
    assert check_video(turned(data), VideoLimits()) == VideoInfo(3, 16, 32)
    found = read_video(data, VideoLimits())
    assert [image.tobytes() for image in found] == [image.tobytes() for image in frames(data)]
    for bad, limits, code, words in (
        (data, VideoLimits(frames=2), "too_large", "at most 2 frames"),
        (data[:300], VideoLimits(), "damaged", r"damaged or not complete \([A-Z][a-z ]*\): send"),
        (b"GIF89a", VideoLimits(), "unsupported", "must be a video"),
    ):
        with pytest.raises(VideoInputError, match=words) as refused:
            check_video(bad, limits)
        assert refused.value.code == code


def test_a_video_that_takes_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_input, "_LEFT_TO_START_S", 0)
    with pytest.raises(VideoInputError, match="within 0 s") as refused:
        check_video(film(3), VideoLimits(seconds=0))
    assert refused.value.code == "too_large"


class UnwantedError(Exception):
    pass


def test_frames_come_as_they_are_decoded_and_the_child_ends_when_they_are_not_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    children: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            children.append(self)

    monkeypatch.setattr(subprocess, "Popen", Recorded)
    data = film(8, (320, 240))  # no pipe holds so many frames: the child cannot end before they are read
    found = read_video(data, VideoLimits())
    assert next(found).size == (320, 240)
    assert children[0].poll() is None
    found.close()  # type: ignore[attr-defined]
    assert children[0].returncode == -signal.SIGKILL
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise UnwantedError

    with pytest.raises(UnwantedError):
        list(read_video(data, VideoLimits(), check))
    assert children[1].returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "said",
    [
        "",
        "{}",
        '{"type":"_Frame","width":70000,"height":70000}',
        '{"type":"_Frame","width":4,"height":-4}',
        '{"type":"_Frame","width":4,"height":4}',
        '{"type":"_Success","info":{"frames":2,"width":4,"height":4}}',
    ],
)
def test_what_a_child_says_is_not_trusted(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    written = _LENGTH.pack(len(said)) + said.encode() if said else b""
    program = f"import sys; sys.stdout.buffer.write({written!r})"
    start = subprocess.Popen

    def popen(_: Any, **options: Any) -> subprocess.Popen[bytes]:
        return start((sys.executable, "-I", "-S", "-c", program), **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(VideoInputError, match="could not be decoded"):
        list(read_video(film(3), VideoLimits()))
