"""Images, archives and WAV files; test_mp4.py is about MP4."""

from __future__ import annotations

import io
import wave
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.roles.media.decoded import Audio, Latents, Media, MediaError, Stills, VideoFrames
from triptych.roles.media.formats import FORMATS, formats_for
from triptych.roles.media.writers import default_format, encode


def image(mode: str = "RGB") -> Image.Image:
    return Image.frombytes("RGB", (16, 8), bytes(range(256)) + bytes(128)).convert(mode)


def film(frames: int = 3) -> VideoFrames:
    return VideoFrames(np.random.default_rng(0).integers(0, 256, (frames, 8, 10, 3), np.uint8))


SOUND = Audio(np.sin(np.arange(200, dtype=np.float32) / 5).reshape(2, 100), 8000)
LAYERS = Stills([image("RGBA"), image("LA")])
LATENTS = Latents({"latents": torch.ones(1, 4, 2, 2, dtype=torch.bfloat16)})
FITTING: dict[str, tuple[Media, ...]] = {
    "png": (Stills([image()]), film(), film(1)),
    "jpeg": (Stills([image()]), film(1)),
    "webp": (Stills([image()]), film(), film(1)),
    "gif": (Stills([image()]), film(), film(1)),
    "mp4": (film(), film(1), VideoFrames(film().frames, SOUND)),
    "zip": (Stills([image()]), LAYERS, film(), film(1), VideoFrames(film().frames, SOUND)),
    "wav": (SOUND,),
    "safetensors": (LATENTS,),
}
UNFIT: dict[str, tuple[Media, ...]] = {
    "png": (LAYERS, SOUND),
    "jpeg": (LAYERS, film(), SOUND),
    "webp": (LAYERS, SOUND),
    "gif": (LAYERS, SOUND),
    "mp4": (Stills([image()]), LAYERS, SOUND),
    "zip": (SOUND,),
    "wav": (Stills([image()]), film(), VideoFrames(film().frames, SOUND), LATENTS),
    "safetensors": (Stills([image()]), film(), SOUND),
}


@pytest.mark.parametrize("output_format", FORMATS)
def test_the_same_media_always_give_the_same_bytes(output_format: str) -> None:
    for media in FITTING[output_format]:
        assert encode(media, output_format, 16.0) == encode(media, output_format, 16.0)


@pytest.mark.parametrize("output_format", FORMATS)
def test_what_a_format_cannot_hold_is_refused_in_words(output_format: str) -> None:
    for media in UNFIT[output_format]:
        with pytest.raises(MediaError, match=f"which a file of the format {output_format} cannot hold"):
            encode(media, output_format, 16.0)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(MediaError, match=r"'\?' is none of png, jpeg"):
        encode(Stills([image()]), "?", 16.0)


@pytest.mark.parametrize(
    ("media", "output_format"),
    [
        (Stills([image()]), "png"),
        (LAYERS, "zip"),
        (film(), "mp4"),
        (film(1), "png"),
        (VideoFrames(film(1).frames, SOUND), "mp4"),
        (SOUND, "wav"),
    ],
)
def test_media_get_the_format_that_suits_them(media: Media, output_format: str) -> None:
    assert default_format(media) == output_format
    assert encode(media, output_format, 16.0)
    medium = {Stills: "image", VideoFrames: "video", Audio: "audio"}[type(media)]
    assert output_format in formats_for(medium)


def test_nothing_of_where_an_image_came_from_is_written() -> None:
    again = image()
    again.info["Software"] = "somebody"
    for output_format in ("png", "jpeg", "webp", "zip"):
        assert encode(Stills([again]), output_format, 16.0) == encode(Stills([image()]), output_format, 16.0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("output_format", [name for name in FORMATS if "image" in FORMATS[name].holds])
def test_images_of_every_mode_are_written(mode: str, output_format: str) -> None:
    data = encode(Stills([image("L").convert(mode)]), output_format, 16.0)
    if output_format != "zip":
        written = Image.open(io.BytesIO(data))
        assert (written.size, written.format) == ((16, 8), output_format.upper())


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_png_is_exact(mode: str) -> None:
    written = Image.open(io.BytesIO(encode(Stills([image(mode)]), "png", 16.0)))
    assert (written.mode, written.tobytes()) == (mode, image(mode).tobytes())


@pytest.mark.parametrize("output_format", ["png", "webp"])
def test_a_moving_image_has_every_frame_and_keeps_its_pace(output_format: str) -> None:
    moving = Image.open(io.BytesIO(encode(film(4), output_format, 8.0)))
    assert moving.n_frames == 4  # type: ignore[attr-defined]
    durations = []
    for number, frame in enumerate(film(4).frames):
        moving.seek(number)
        moving.load()
        durations.append(moving.info["duration"])
        if output_format == "png":
            assert np.array_equal(np.asarray(moving.convert("RGB")), frame)
    assert durations == [125] * 4


def test_a_gif_lasts_as_long_as_the_video() -> None:
    moving = Image.open(io.BytesIO(encode(film(8), "gif", 16.0)))
    durations = []
    for number in range(8):
        moving.seek(number)
        durations.append(moving.info["duration"])
    assert sum(durations) == 500, "frames of a sixteenth of a second, in hundredths"


def test_a_zip_has_the_frames_in_order_bit_for_bit_and_the_sound() -> None:
    media = VideoFrames(film(11).frames, SOUND)
    with zipfile.ZipFile(io.BytesIO(encode(media, "zip", 16.0))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [*(f"{k:05}.png" for k in range(11)), "sound.wav"]
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}
        frames = [np.asarray(Image.open(archive.open(name))) for name in archive.namelist()[:-1]]
        assert np.array_equal(np.stack(frames), media.frames)
        assert archive.read("sound.wav") == encode(SOUND, "wav", 0.0)
    with zipfile.ZipFile(io.BytesIO(encode(LAYERS, "zip", 0.0))) as archive:
        assert [Image.open(archive.open(name)).mode for name in archive.namelist()] == ["RGBA", "LA"]


def test_a_wav_has_every_sample() -> None:
    with wave.open(io.BytesIO(encode(SOUND, "wav", 0.0))) as file:
        header = (file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes())
        assert header == (2, 2, 8000, 100)
        samples = np.frombuffer(file.readframes(100), "<i2").reshape(100, 2).T
    assert np.abs(samples / 32767 - SOUND.samples).max() <= 0.5 / 32767 + 1e-6


@pytest.mark.parametrize("output_format", ["png", "webp", "zip", "mp4"])
def test_writing_a_long_video_can_be_ended_between_two_frames(output_format: str) -> None:
    seen = []

    def check() -> None:
        seen.append(None)
        if len(seen) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        encode(film(9), output_format, 16.0, check)
    assert len(seen) == 2


def test_an_image_of_16_bits_keeps_them_in_a_png_and_is_scaled_elsewhere() -> None:
    depth = Image.fromarray(np.linspace(0, 65535, 128).astype(np.uint16).reshape(8, 16))
    kept = Image.open(io.BytesIO(encode(Stills([depth]), "png", 1.0)))
    assert kept.mode == "I;16"
    assert np.array_equal(np.asarray(kept), np.asarray(depth))
    scaled = np.asarray(Image.open(io.BytesIO(encode(Stills([depth]), "webp", 1.0))).convert("L"), np.int32)
    assert abs(scaled - (np.asarray(depth) >> 8)).max() < 16
