"""Decode a video that a client sent, in a process of its own (docs/adr/0058).

FFmpeg's demuxers and decoders are much code for untrusted bytes. They run in a child process that has the file on its
stdin, limits on its memory, its time and its files, and nothing of this process: its end is one request's error. The
child is told which demuxer to take, and has a few decoders; it opens no other file and no connection.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, BinaryIO, Final, Literal, TypeAlias, cast

import msgspec
from PIL import Image

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext
    from av.video.frame import VideoFrame

DEMUXERS: Final = {"mp4": "mov", "webm": "matroska"}
"""FFmpeg's demuxers, by the ending of the files; .mov and .m4v are like the one, .mkv is like the other."""
CODECS: Final = frozenset({"h264", "hevc", "mpeg4", "vp8", "vp9", "av1"})
_DECODERS: Final = (*sorted(CODECS), "libdav1d", "libvpx", "libvpx-vp9")
_MEMORY_BYTES: Final = 2 << 30
_OPEN_FILES: Final = 16
_LEFT_TO_START_S: Final = 30.0
"""Beside the decoding: an interpreter starts, and the machine may have other work."""
_ENVIRONMENT: Final = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH")
"""Variables that the child gets; others may be secrets."""
_TURNS: Final = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)

Code: TypeAlias = Literal["too_large", "unsupported", "damaged"]


class VideoError(ValueError):
    """A video is not decoded; the message says why, without a subject: "must have at most 256 frames"."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code


class VideoLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What a video may be."""

    frames: int = 256
    frame_pixels: int = 1 << 24
    """Of one frame."""
    pixels: int = 256_000_000
    """Of all frames."""
    seconds: int = 30
    """Of computing, to decode it."""


class VideoInfo(msgspec.Struct, frozen=True):
    """What is in a video."""

    frames: int
    width: int
    height: int
    """Of the upright frames, in pixels."""


class _Failure(msgspec.Struct, frozen=True, tag=True):
    code: Code
    message: str


class _Success(msgspec.Struct, frozen=True, tag=True):
    info: VideoInfo


def video_ending(data: bytes) -> str:
    """Return the ending of the container that a file is, of `DEMUXERS`, by its first bytes; "" if it is none."""
    if data[4:8] == b"ftyp":
        return "mp4"
    return "webm" if data.startswith(b"\x1a\x45\xdf\xa3") else ""


def check_video(data: bytes, limits: VideoLimits) -> VideoInfo:
    """Decode a video to see that it can be, and throw the frames away. It blocks, as `read_video` does.

    Raises:
        VideoError: It is damaged, not of a codec of `CODECS`, or beyond a limit.
    """
    info, _ = _run(data, limits, "check")
    return info


def read_video(data: bytes, limits: VideoLimits) -> Iterator[Image.Image]:
    """Decode a video and yield its frames, "RGB" and upright. Call it off the event loop.

    Raises:
        VideoError: See `check_video`.
    """
    info, pixels = _run(data, limits, "read")
    size, nbytes = (info.width, info.height), 3 * info.width * info.height
    if len(pixels) != info.frames * nbytes:
        raise VideoError("damaged", "could not be decoded: frames are missing")
    for at in range(0, len(pixels), nbytes):
        yield Image.frombytes("RGB", size, memoryview(pixels)[at : at + nbytes])


def _run(data: bytes, limits: VideoLimits, wanted: Literal["check", "read"]) -> tuple[VideoInfo, bytes]:
    ending = video_ending(data)
    if not ending:
        raise VideoError("unsupported", "must be a video, an MP4 or WebM")
    arguments = (msgspec.json.encode(limits).decode(), DEMUXERS[ending], wanted)
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    with _as_file(data) as file:
        try:
            child = subprocess.run(  # noqa: S603  our own module, with arguments of our own
                (sys.executable, "-P", "-m", "triptych.roles.media.video_input", *arguments),
                stdin=file,
                capture_output=True,
                timeout=limits.seconds + _LEFT_TO_START_S,
                env=environment,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise _too_slow(limits) from None
    try:
        report = msgspec.json.decode(child.stderr.rpartition(b"\n")[2], type=_Success | _Failure)
    except msgspec.MsgspecError:  # it was ended by a limit or by a signal
        if child.returncode == -signal.SIGXCPU:
            raise _too_slow(limits) from None
        raise VideoError("damaged", "could not be decoded") from None
    if isinstance(report, _Failure):
        raise VideoError(report.code, report.message)
    return report.info, child.stdout


def _too_slow(limits: VideoLimits) -> VideoError:
    return VideoError("too_large", f"must be decoded within {limits.seconds} s: send a smaller one")


@contextmanager
def _as_file(data: bytes) -> Iterator[IO[bytes]]:
    """Open bytes as a file without a name, so that the child can read it from any place."""
    with os.fdopen(os.memfd_create("video"), "w+b") as file:
        file.write(data)
        file.seek(0)
        yield file


# -- in the child


def main() -> None:
    """Decode stdin: write the frames to stdout if they are wanted, and a report to stderr, after a newline."""
    import av

    limits = msgspec.json.decode(sys.argv[1], type=VideoLimits)
    demuxer, wanted = sys.argv[2:]
    _confine(limits)
    report: _Success | _Failure
    try:
        report = _Success(_decode(demuxer, limits, sys.stdout.buffer if wanted == "read" else None))
    except VideoError as error:
        report = _Failure(error.code, str(error))
    except (av.FFmpegError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        report = _Failure("damaged", f"is damaged or not complete ({why}): send the whole file")
    except MemoryError:
        report = _Failure("too_large", "needs too much memory to be decoded: send a smaller one")
    sys.stderr.buffer.write(b"\n" + msgspec.json.encode(report))


def _decode(demuxer: str, limits: VideoLimits, frames: BinaryIO | None) -> VideoInfo:
    """Decode stdin, and write the pixels of its frames one after the other. Raises as `_frames`."""
    count, size = 0, (0, 0)
    for frame in _frames(sys.stdin.buffer, demuxer, limits):
        sides = (frame.height, frame.width) if _turns(frame) % 2 else (frame.width, frame.height)
        if count and sides != size:
            raise VideoError("unsupported", "must have frames of one size")
        count, size = count + 1, sides
        if frames is not None:
            frames.write(_upright(frame).tobytes())
    if not count:
        raise VideoError("damaged", "has no frames")
    if frames is not None:
        frames.flush()
    return VideoInfo(count, *size)


def _confine(limits: VideoLimits) -> None:
    """Give up what decoding does not need: files, threads, more memory and more time."""
    for what, soft, hard in (
        (resource.RLIMIT_AS, _MEMORY_BYTES, _MEMORY_BYTES),
        (resource.RLIMIT_CPU, limits.seconds, limits.seconds + 1),  # the first sends SIGXCPU, the second kills
        (resource.RLIMIT_NOFILE, _OPEN_FILES, _OPEN_FILES),
        (resource.RLIMIT_FSIZE, 0, 0),
        (resource.RLIMIT_NPROC, 0, 0),
        (resource.RLIMIT_CORE, 0, 0),
    ):
        _, highest = resource.getrlimit(what)
        if highest != resource.RLIM_INFINITY:
            soft, hard = min(soft, highest), min(hard, highest)
        resource.setrlimit(what, (soft, hard))


def _frames(file: BinaryIO, demuxer: str, limits: VideoLimits) -> Iterator[VideoFrame]:
    import av

    options = {
        "codec_whitelist": ",".join(_DECODERS),
        "format_whitelist": demuxer,
        "protocol_whitelist": "none",
        "max_pixels": str(2 * limits.frame_pixels),  # which counts what is allocated, with wider rows
        "threads": "1",
    }
    with av.open(file, "r", format=demuxer, options=options, metadata_errors="replace") as container:
        if not container.streams.video:
            raise VideoError("damaged", "has no video, or is not complete")
        stream = container.streams.video[0]
        codec = stream.codec_context.codec.canonical_name if stream.codec_context else "an unknown codec"
        if codec not in CODECS:
            raise VideoError("unsupported", f"is {codec}: send one of {', '.join(sorted(CODECS))}")
        _check_frame(stream.codec_context, limits)
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": options["max_pixels"]}
        pixels = 0
        for count, frame in enumerate(container.decode(stream)):
            pixels += frame.width * frame.height
            if count == limits.frames:
                raise VideoError("too_large", f"must have at most {limits.frames} frames")
            _check_frame(frame, limits)
            if pixels > limits.pixels:
                raise VideoError("too_large", f"must have at most {limits.pixels} pixels in all its frames together")
            yield frame


def _check_frame(frame: VideoFrame | VideoCodecContext, limits: VideoLimits) -> None:
    if frame.width * frame.height > limits.frame_pixels:
        raise VideoError("too_large", f"must have at most {limits.frame_pixels} pixels in a frame")


def _upright(frame: VideoFrame) -> Image.Image:
    image = cast(Image.Image, frame.to_image(threads=1))  # type: ignore[no-untyped-call]
    turn = _TURNS[_turns(frame)]
    return image if turn is None else image.transpose(turn)


def _turns(frame: VideoFrame) -> int:
    """Return how often a frame is to be turned by 90 degrees counterclockwise, below 4."""
    return round(frame.rotation / 90) % 4


if __name__ == "__main__":
    main()
