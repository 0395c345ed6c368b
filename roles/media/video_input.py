"""Decode a video that a client sent, in a process of its own (docs/adr/0058).

FFmpeg's demuxers and decoders are much code for untrusted bytes. They run in a child process that has the file on its
stdin, limits on its memory, its time and its files, and nothing of this process: its end is one request's error. The
child is told which demuxer to take, and has a few decoders; it opens no other file and no connection.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from typing import IO, TYPE_CHECKING, Annotated, BinaryIO, Final, Literal, Self, TypeAlias, cast

import msgspec
from msgspec import Meta
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
_CHECK_EVERY_S: Final = 0.1
"""Seconds within which the child ends, however long it decodes, when nobody wants the video any more."""
_TO_END_S: Final = 10.0
"""For a child that has closed its stdout."""
_LENGTH: Final = struct.Struct("<H")
"""Precedes each message of the child, in bytes of JSON."""
_ENVIRONMENT: Final = ("HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH")
"""Variables that the child gets; others may be secrets."""
_TURNS: Final = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)

Code: TypeAlias = Literal["too_large", "unsupported", "damaged"]


class VideoInputError(ValueError):
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


class _Frame(msgspec.Struct, frozen=True, tag=True):
    """The pixels of a frame follow: "RGB", row by row."""

    width: Annotated[int, Meta(ge=1)]
    height: Annotated[int, Meta(ge=1)]


class _Failure(msgspec.Struct, frozen=True, tag=True):
    code: Code
    message: str


class _Success(msgspec.Struct, frozen=True, tag=True):
    info: VideoInfo


def no_check() -> None:
    """Let the decoding go on."""


def video_ending(data: bytes) -> str:
    """Return the ending of the container that a file is, of `DEMUXERS`, by its first bytes; "" if it is none."""
    if data[4:8] == b"ftyp":
        return "mp4"
    return "webm" if data.startswith(b"\x1a\x45\xdf\xa3") else ""


def check_video(data: bytes, limits: VideoLimits) -> VideoInfo:
    """Decode a video to see that it can be, and throw the frames away. It blocks, as `read_video` does.

    Raises:
        VideoInputError: It is damaged, not of a codec of `CODECS`, or beyond a limit.
    """
    with _Child(data, limits, "check", no_check) as child:
        message = child.receive()
    if not isinstance(message, _Success):
        raise _broken()
    return message.info


def read_video(data: bytes, limits: VideoLimits, check: Callable[[], None] = no_check) -> Iterator[Image.Image]:
    """Decode a video and yield its frames, "RGB" and upright, each as it is decoded. Call it off the event loop.

    Args:
        data: The file.
        limits: What it may be.
        check: Called several times a second; what it raises ends the decoding.

    Raises:
        VideoInputError: See `check_video`.
    """
    frames, pixels = 0, 0
    with _Child(data, limits, "read", check) as child:
        while isinstance(message := child.receive(), _Frame):
            frames, pixels = frames + 1, pixels + message.width * message.height
            if frames > limits.frames or pixels > limits.pixels:  # which the child has to see to
                raise _broken()
            nbytes = 3 * message.width * message.height
            yield Image.frombytes("RGB", (message.width, message.height), child.read(nbytes))
    if message.info.frames != frames:
        raise _broken()


class _Child:
    """A process that decodes one video. It is a context: the process has ended when that is left.

    Args:
        data: The file.
        limits: What it may be.
        wanted: Whether the frames are to be read, or only to be decoded.
        check: Called while the child is waited for; what it raises ends the waiting.

    Raises:
        VideoInputError: It is of no container of `DEMUXERS`.
    """

    def __init__(
        self, data: bytes, limits: VideoLimits, wanted: Literal["check", "read"], check: Callable[[], None]
    ) -> None:
        ending = video_ending(data)
        if not ending:
            raise VideoInputError("unsupported", "must be a video, an MP4 or WebM")
        self._limits, self._check = limits, check
        self._end = time.monotonic() + limits.seconds + _LEFT_TO_START_S
        arguments = (msgspec.json.encode(limits).decode(), DEMUXERS[ending], wanted)
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        with _as_file(data) as file:
            self._process = subprocess.Popen(  # noqa: S603  our own module, with arguments of our own
                (sys.executable, "-P", "-m", "triptych.roles.media.video_input", *arguments),
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # a pipe that nobody empties would hold it up
                bufsize=0,
                env=environment,
            )
        self._stdout = cast(FileIO, self._process.stdout)
        self._readable = select.poll()
        self._readable.register(self._stdout, select.POLLIN)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self._stdout.close()

    def receive(self) -> _Frame | _Success:
        """Return what the child says next. Raises VideoInputError, which may be what it says."""
        (nbytes,) = _LENGTH.unpack(self.read(_LENGTH.size))
        try:
            message = msgspec.json.decode(self.read(nbytes), type=_Frame | _Success | _Failure)
        except msgspec.MsgspecError:
            raise _broken() from None
        if isinstance(message, _Failure):
            raise VideoInputError(message.code, message.message)
        return message

    def read(self, nbytes: int) -> bytearray:
        """Return the next bytes of the child, just so many; raises VideoInputError if it ends or is too slow."""
        data, count = bytearray(nbytes), 0
        while count < nbytes:
            self._check()
            left_s = self._end - time.monotonic()
            if left_s <= 0:
                raise self._too_slow()
            if self._readable.poll(1000 * min(left_s, _CHECK_EVERY_S)):
                read = self._stdout.readinto(memoryview(data)[count:])
                if not read:
                    raise self._ended()
                count += read
        return data

    def _ended(self) -> VideoInputError:
        """Return why the child closed its stdout before it was done: a limit or a signal has ended it."""
        try:
            code = self._process.wait(_TO_END_S)
        except subprocess.TimeoutExpired:
            return _broken()
        return self._too_slow() if code == -signal.SIGXCPU else _broken()

    def _too_slow(self) -> VideoInputError:
        return VideoInputError("too_large", f"must be decoded within {self._limits.seconds} s: send a smaller one")


def _broken() -> VideoInputError:
    return VideoInputError("damaged", "could not be decoded")


@contextmanager
def _as_file(data: bytes) -> Iterator[IO[bytes]]:
    """Open bytes as a file without a name, so that the child can read it from any place."""
    with os.fdopen(os.memfd_create("video"), "w+b") as file:
        file.write(data)
        file.seek(0)
        yield file


# -- in the child


def main() -> None:
    """Decode stdin: write to stdout what `_Child` receives, the frames if they are wanted and a report."""
    import av

    limits = msgspec.json.decode(sys.argv[1], type=VideoLimits)
    demuxer, wanted = sys.argv[2:]
    _confine(limits)
    report: _Success | _Failure
    stdout = sys.stdout.buffer
    try:
        report = _Success(_decode(demuxer, limits, stdout if wanted == "read" else None))
    except VideoInputError as error:
        report = _Failure(error.code, str(error))
    except (av.FFmpegError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        report = _Failure("damaged", f"is damaged or not complete ({why}): send the whole file")
    except MemoryError:
        report = _Failure("too_large", "needs too much memory to be decoded: send a smaller one")
    _send(stdout, report)
    stdout.flush()


def _send(stdout: BinaryIO, message: _Frame | _Success | _Failure) -> None:
    data = msgspec.json.encode(message)
    stdout.write(_LENGTH.pack(len(data)) + data)


def _decode(demuxer: str, limits: VideoLimits, stdout: BinaryIO | None) -> VideoInfo:
    """Decode stdin, and write its frames one after the other. Raises as `_frames`."""
    count, size = 0, (0, 0)
    for frame in _frames(sys.stdin.buffer, demuxer, limits):
        sides = (frame.height, frame.width) if _turns(frame) % 2 else (frame.width, frame.height)
        if count and sides != size:
            raise VideoInputError("unsupported", "must have frames of one size")
        count, size = count + 1, sides
        if stdout is not None:
            pixels = _upright(frame).tobytes()
            _send(stdout, _Frame(*sides))
            stdout.write(pixels)
    if not count:
        raise VideoInputError("damaged", "has no frames")
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
            raise VideoInputError("damaged", "has no video, or is not complete")
        stream = container.streams.video[0]
        codec = stream.codec_context.codec.canonical_name if stream.codec_context else "an unknown codec"
        if codec not in CODECS:
            raise VideoInputError("unsupported", f"is {codec}: send one of {', '.join(sorted(CODECS))}")
        _check_frame(stream.codec_context, limits)
        stream.codec_context.thread_count = 1
        stream.codec_context.options = {"max_pixels": options["max_pixels"]}
        pixels = 0
        for count, frame in enumerate(container.decode(stream)):
            pixels += frame.width * frame.height
            if count == limits.frames:
                raise VideoInputError("too_large", f"must have at most {limits.frames} frames")
            _check_frame(frame, limits)
            if pixels > limits.pixels:
                raise VideoInputError(
                    "too_large", f"must have at most {limits.pixels} pixels in all its frames together"
                )
            yield frame


def _check_frame(frame: VideoFrame | VideoCodecContext, limits: VideoLimits) -> None:
    if frame.width * frame.height > limits.frame_pixels:
        raise VideoInputError("too_large", f"must have at most {limits.frame_pixels} pixels in a frame")


def _upright(frame: VideoFrame) -> Image.Image:
    image = cast(Image.Image, frame.to_image(threads=1))  # type: ignore[no-untyped-call]
    turn = _TURNS[_turns(frame)]
    return image if turn is None else image.transpose(turn)


def _turns(frame: VideoFrame) -> int:
    """Return how often a frame is to be turned by 90 degrees counterclockwise, below 4."""
    return round(frame.rotation / 90) % 4


if __name__ == "__main__":
    main()
