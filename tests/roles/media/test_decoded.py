"""What a decoder returned becomes images, a video or sound, or is refused in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from triptych.roles.media.decoded import Audio, MediaError, Stills, VideoFrames, to_media

RAMP = np.linspace(0, 1, 3 * 4 * 5 * 3, dtype=np.float32).reshape(1, 3, 4, 5, 3)
BYTES = np.rint(RAMP * 255).astype(np.uint8)
FILM = [Image.fromarray(frame) for frame in BYTES[0]]
WAVE = np.sin(np.arange(2 * 50, dtype=np.float32)).reshape(2, 50)
RATE = {"sampling_rate": 24000}


def video(value: object, **more: object) -> VideoFrames:
    found = to_media({"videos": value, **more})
    assert isinstance(found, VideoFrames)
    return found


@pytest.mark.parametrize(
    "value",
    [
        RAMP,
        RAMP[0],
        RAMP.astype(np.float64),
        torch.from_numpy(RAMP),
        BYTES,
        FILM,
        [FILM],
        [RAMP[0]],
        [torch.from_numpy(RAMP)],
        list(BYTES[0]),
    ],
    ids=range(10),
)
def test_every_way_to_return_a_video_gives_the_same_frames(value: object) -> None:
    found = video(value)
    assert found.frames.dtype == np.uint8
    assert np.array_equal(found.frames, BYTES[0])
    assert found.sound is None


def test_frames_are_rounded_as_diffusers_rounds_and_clipped() -> None:
    frames = np.array([-0.5, 0.5 / 255, 1.5 / 255, 0.9999, 1.0, 7.0], np.float32).reshape(1, 1, 1, 2, 3)
    assert video(frames).frames.ravel().tolist() == [0, 0, 2, 255, 255, 255]
    grey = Image.new("L", (2, 1), 7)
    assert video([grey]).frames.tolist() == [[[[7, 7, 7], [7, 7, 7]]]]


@pytest.mark.parametrize("value", [FILM[0], FILM[:1], [[*FILM[:1]]], tuple(FILM[:1])], ids=range(4))
def test_one_image(value: object) -> None:
    found = to_media({"images": value, "audio": None})
    assert isinstance(found, Stills)
    assert list(found.images) == FILM[:1]


def test_several_images_are_the_layers_of_one() -> None:
    layers = [Image.new("RGBA", (4, 4), (k, 0, 0, k)) for k in range(3)]
    for value in (layers, [layers]):
        found = to_media({"images": value})
        assert isinstance(found, Stills)
        assert list(found.images) == layers


@pytest.mark.parametrize(
    ("value", "channels"),
    [(WAVE, 2), (WAVE[None], 2), (torch.from_numpy(WAVE)[None], 2), (WAVE[0], 1), (WAVE[:1], 1), ([WAVE], 2)],
    ids=range(6),
)
@pytest.mark.parametrize("name", ["audio", "audios", "sound"])
def test_every_way_to_return_sound(name: str, value: Any, channels: int) -> None:
    alone = to_media({name: value, **RATE})
    assert isinstance(alone, Audio)
    assert (alone.rate, alone.samples.dtype) == (24000, np.float32)
    assert np.array_equal(alone.samples, WAVE[:channels])
    beside = video(RAMP, **{name: value}, **RATE).sound
    assert beside is not None
    assert np.array_equal(beside.samples, alone.samples)


def test_sound_is_clipped_and_half_precision_is_taken() -> None:
    loud = torch.tensor([[[-3.0, 0.5, 2.0]]], dtype=torch.bfloat16)
    found = to_media({"audio": loud, **RATE})
    assert isinstance(found, Audio)
    assert found.samples.tolist() == [[-1.0, 0.5, 1.0]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "nothing"),
        ({"images": None}, "nothing"),
        ({"latents": torch.zeros(1), "images": FILM}, "made images and latents"),
        ({"images": FILM, "videos": RAMP}, "images and videos"),
        ({"images": FILM, "audio": WAVE, **RATE}, "audio and images"),
        ({"videos": RAMP, "action": [torch.zeros(2)]}, "action and videos"),
        ({"audio": WAVE, "sound": WAVE, **RATE}, "audio and sound"),
        ({"images": []}, "no images"),
        ({"images": [RAMP]}, "no images"),
        ({"images": torch.zeros(1)}, "no images"),
        ({"videos": np.zeros((2, 1, 1, 1, 3))}, r"shape \(2, 1, 1, 1, 3\)"),
        ({"videos": np.zeros((1, 1, 3, 4, 4))}, r"frame of shape \(3, 4, 4\)"),
        ({"videos": np.zeros((1, 0, 4, 4, 3))}, "no frames"),
        ({"videos": np.zeros((1, 1, 0, 4, 3))}, "frame of shape"),
        ({"videos": np.zeros((1, 1, 4, 4, 3), np.int64)}, "int64"),
        ({"videos": []}, "no frames"),
        ({"videos": "film.mp4"}, "a str"),
        ({"videos": [FILM[0], Image.new("RGB", (9, 9))]}, "frames of shapes"),
        ({"audio": WAVE}, "not known"),
        ({"audio": WAVE, "sampling_rate": 0}, "samples per second"),
        ({"audio": WAVE, "sampling_rate": 24000.5}, "24000.5"),
        ({"audio": np.zeros((6, 100)), **RATE}, "of one or two channels"),
        ({"audio": np.zeros((2, 2, 100)), **RATE}, r"shape \(2, 2, 100\)"),
        ({"audio": np.zeros((2, 0)), **RATE}, r"shape \(2, 0\)"),
        ({"audio": np.zeros((2, 9), np.int16), **RATE}, "int16"),
        ({"audio": np.full((1, 9), np.nan), **RATE}, "no numbers"),
    ],
)
def test_what_is_no_medium_is_refused_in_words(values: dict[str, object], said: str) -> None:
    with pytest.raises(MediaError, match=said):
        to_media(values)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_frame_with_values_that_are_no_numbers_is_not_written_as_noise(value: float) -> None:
    broken = RAMP.copy()
    broken[0, 1, 2, 3, 0] = value
    with pytest.raises(MediaError, match="frame 1 of the video"):
        to_media({"videos": broken})


def test_reading_a_long_video_can_be_ended_between_two_frames() -> None:
    seen = []

    def check() -> None:
        seen.append(None)
        if len(seen) == 2:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        to_media({"videos": RAMP}, check)
    assert len(seen) == 2
