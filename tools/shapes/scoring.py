"""Scores an image by its pixels: whether it is what the caption asked for."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from triptych.tools.shapes.scenes import EDGE, PALETTE, PLACES, RADIUS, SHAPES, Pixels, Scene, outline

BAND = 8
"""Rows at the top and at the bottom that no shape reaches: they show the background."""
OBJECT_DISTANCE = 60.0
"""RGB distance from the background beyond which a pixel may belong to the object."""
COLOUR_DISTANCE = 70.0
"""RGB distance to the nearest palette entry beyond which a colour has no name."""
SMALLEST_AREA = 40.0
OUTLINE_AGREEMENT = 0.85
"""Intersection over union with the ideal outline that a shape must reach."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DetectedScene:
    """What the pixels show, in the words of the captions; an empty word where nothing fits."""

    background: str = ""
    colour: str = ""
    place: str = ""
    size: str = ""
    shape: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """Which of the five properties of a caption its image has."""

    background: bool
    colour: bool
    place: bool
    size: bool
    shape: bool

    @property
    def perfect(self) -> bool:
        """Whether all five are right."""
        return all(asdict(self).values())


def score(image: Pixels, scene: Scene) -> Score:
    """Compare an image, uint8 (EDGE, EDGE, 3), with the scene that it should show."""
    seen = detect(image)
    return Score(
        background=seen.background == scene.background,
        colour=seen.colour == scene.colour,
        place=seen.place == scene.place,
        size=seen.size == scene.size,
        shape=seen.shape == scene.shape,
    )


def detect(image: Pixels) -> DetectedScene:
    """Read the five properties from an image, uint8 (EDGE, EDGE, 3).

    Raises:
        ValueError: the image has another size.

    """
    if image.shape != (EDGE, EDGE, 3):
        raise ValueError(f"an image of {EDGE} x {EDGE} RGB pixels is needed, this one is {image.shape}")
    pixels = image.astype(np.float32)
    ground = np.median(np.concatenate([pixels[:BAND], pixels[-BAND:]]).reshape(-1, 3), axis=0)
    background = _name(ground)
    cover, colour = _object(pixels, ground)
    area = float(cover.sum())
    if area < SMALLEST_AREA:
        return DetectedScene(background=background)
    rows, columns = np.mgrid[0:EDGE, 0:EDGE].astype(np.float32) + 0.5
    x = float((columns * cover).sum()) / area
    y = float((rows * cover).sum()) / area
    agreements = {shape: _agreement(cover, shape, x, y, area) for shape in SHAPES}
    best = max(agreements, key=agreements.__getitem__)
    return DetectedScene(
        background=background,
        colour=_name(colour),
        place=_nearest(x, PLACES, within=6.0),
        size=_nearest(_radius(best, area), RADIUS, within=2.5),
        shape=best if agreements[best] >= OUTLINE_AGREEMENT else "",
    )


def _object(pixels: Floats, ground: Floats) -> tuple[Floats, Floats]:
    """Find the object's share of each pixel, float32 (EDGE, EDGE), and its colour (3,)."""
    distance = np.linalg.norm(pixels - ground, axis=-1)
    strongest = np.sort(distance[distance > OBJECT_DISTANCE])
    if strongest.size == 0:
        return np.zeros((EDGE, EDGE), np.float32), ground
    inside = distance >= 0.9 * strongest[strongest.size // 2]
    colour = np.median(pixels[inside], axis=0)
    span = colour - ground
    cover = ((pixels - ground) @ span) / max(float(span @ span), 1.0)
    return np.where(cover < 0.1, 0.0, np.clip(cover, 0.0, 1.0)).astype(np.float32), colour


def _name(colour: Floats) -> str:
    distances = {name: float(np.linalg.norm(colour - np.array(rgb))) for name, rgb in PALETTE.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= COLOUR_DISTANCE else ""


def _nearest(value: float, table: dict[str, float], within: float) -> str:
    word = min(table, key=lambda name: abs(table[name] - value))
    return word if abs(table[word] - value) <= within else ""


def _radius(shape: str, area: float) -> float:
    """Give the radius in pixels at which a shape has this area in pixels."""
    unit = float(outline(shape, EDGE / 2, EDGE / 2, 10.0).sum()) / 100.0
    return float(np.sqrt(area / unit))


def _agreement(cover: Floats, shape: str, x: float, y: float, area: float) -> float:
    """Soft intersection over union with the shape of the same area and centre of gravity."""
    ideal = outline(shape, x, y, _radius(shape, area))
    return float(np.minimum(cover, ideal).sum() / np.maximum(cover, ideal).sum())
