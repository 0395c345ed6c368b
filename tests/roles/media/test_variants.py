"""What is made of a finished video."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from tests.video_files import COLOURS, film
from triptych.roles.media.variants import MOST_TILES, chosen_frames, make_spritesheet, make_thumbnail


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_a_thumbnail_is_the_first_frame_and_small() -> None:
    image = opened(make_thumbnail(io.BytesIO(film())))
    assert (image.format, image.size) == ("WEBP", (32, 16))
    np.testing.assert_allclose(np.asarray(image.convert("RGB")).mean(axis=(0, 1)), COLOURS[0], atol=12)
    assert opened(make_thumbnail(io.BytesIO(film(1, (1024, 256))))).size == (512, 128)


def test_a_sheet_has_the_frames_in_rows() -> None:
    sheet = opened(make_spritesheet(io.BytesIO(film(7))))
    assert (sheet.format, sheet.size) == ("JPEG", (5 * 32, 2 * 16))
    pixels = np.asarray(sheet)
    for k in range(7):
        tile = pixels[k // 5 * 16 :][4:12, k % 5 * 32 :][:, 8:24]
        np.testing.assert_allclose(tile.mean(axis=(0, 1)), COLOURS[k % 3], atol=12)
    assert opened(make_spritesheet(io.BytesIO(film(1)))).size == (32, 16)


def test_of_a_long_video_the_sheet_has_frames_at_equal_distances() -> None:
    assert chosen_frames(3) == {0, 1, 2}
    assert chosen_frames(MOST_TILES) == frozenset(range(MOST_TILES))
    for count in (26, 81, 4096):
        chosen = sorted(chosen_frames(count))
        assert (len(chosen), chosen[0], chosen[-1]) == (MOST_TILES, 0, count - 1)
        assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1
