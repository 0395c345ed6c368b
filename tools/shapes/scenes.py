"""Scenes, their captions and their images, and which of them are kept out of training.

Nothing here needs torch: the scorer, the server's tests and the trainer share it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

EDGE = 64
PALETTE: dict[str, tuple[int, int, int]] = {
    "red": (225, 25, 30),
    "green": (20, 150, 45),
    "blue": (25, 60, 220),
    "yellow": (250, 220, 20),
    "orange": (245, 125, 10),
    "purple": (130, 30, 170),
    "pink": (255, 130, 190),
    "cyan": (0, 200, 230),
    "white": (250, 250, 250),
    "black": (10, 10, 10),
    "gray": (128, 128, 128),
}
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan", "white", "black")
BACKGROUNDS = ("white", "black", "gray", "red", "green", "blue", "yellow", "purple", "cyan")
SHAPES = ("circle", "square", "triangle")
RADIUS = {"large": 14.0, "small": 8.0}
"""Pixels; a circle's radius. The other outlines are scaled from it by `_SCALE`."""
PLACES = {"left": 17.0, "centre": 32.0, "right": 47.0}
"""Pixels from the left edge to the middle of the shape."""
JITTER = 1
"""A seed moves the shape by so many pixels at most, both ways, on both axes."""
HELD_OUT_SHARE = 0.09
SYNONYMS = {
    "large": ("big",),
    "small": ("little", "tiny"),
    "centre": ("center", "middle"),
    "gray": ("grey",),
}
_SCALE = {"circle": 1.0, "square": 0.89, "triangle": 1.22}
_SPLIT_SEED = 20
_TRIANGLE_NORMALS = ((0.0, 1.0), (0.75**0.5, -0.5), (-(0.75**0.5), -0.5))

Triple = tuple[str, str, str]
Coverage = NDArray[np.float32]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Scene:
    """One coloured shape on a plain background; the words are those of the tables above."""

    size: str
    colour: str
    shape: str
    place: str
    background: str

    @property
    def triple(self) -> Triple:
        """The combination that decides whether the scene is held out."""
        return self.colour, self.shape, self.background


@cache
def all_scenes() -> tuple[Scene, ...]:
    """List every scene there is, in a fixed order; the shape never has the background's colour."""
    words = product(RADIUS, COLOURS, SHAPES, PLACES, BACKGROUNDS)
    return tuple(Scene(*row) for row in words if row[1] != row[4])


@cache
def held_out_triples() -> frozenset[Triple]:
    """Choose the triples that training never shows.

    At most one shape of a (colour, background) pair is held out: the model has seen each colour on each
    background and each shape in each colour, and must put the two together.
    """
    pairs = [(colour, ground) for colour, ground in product(COLOURS, BACKGROUNDS) if colour != ground]
    chooser = random.Random(_SPLIT_SEED)
    count = round(len(pairs) * len(SHAPES) * HELD_OUT_SHARE)
    return frozenset((colour, chooser.choice(SHAPES), ground) for colour, ground in chooser.sample(pairs, count))


def training_scenes() -> tuple[Scene, ...]:
    """List the scenes that the model is trained on."""
    return tuple(scene for scene in all_scenes() if scene.triple not in held_out_triples())


def held_out_scenes() -> tuple[Scene, ...]:
    """List the scenes that the model is tested on and never trained on."""
    return tuple(scene for scene in all_scenes() if scene.triple in held_out_triples())


def caption(scene: Scene) -> str:
    """Write the full caption: "a large red circle on the left of a blue background"."""
    preposition = "in" if scene.place == "centre" else "on"
    return (
        f"a {scene.size} {scene.colour} {scene.shape} {preposition} the {scene.place}"
        f" of a {scene.background} background"
    )


def default_background(colour: str) -> str:
    """Give the background of a caption that names none."""
    return "black" if colour == "white" else "white"


def varied_caption(scene: Scene, chooser: random.Random) -> str:
    """Another way to say the same: synonyms, and what goes without saying (large, centre, white) left out."""
    size = "" if scene.size == "large" and chooser.random() < 0.5 else f"{scene.size} "
    article = "an" if not size and scene.colour == "orange" else "a"
    subject = f"{article} {size}{scene.colour} {scene.shape}"
    names_place = scene.place != "centre" or chooser.random() < 0.5
    names_ground = scene.background != default_background(scene.colour) or chooser.random() < 0.5
    where = f"{'in' if scene.place == 'centre' else 'on'} the {scene.place}"
    ground = f"a {scene.background} background"
    text = {
        (True, True): f"{subject} {where} of {ground}",
        (True, False): f"{subject} {where}",
        (False, True): f"{subject} on {ground}",
        (False, False): subject,
    }[names_place, names_ground]
    words = (chooser.choice((word, *SYNONYMS.get(word, ()))) for word in text.split())
    return " ".join(words)


def vocabulary() -> tuple[str, ...]:
    """List every word that a caption can have, sorted."""
    words = {"a", "an", "on", "in", "the", "of", "background"}
    words.update(RADIUS, PALETTE, SHAPES, PLACES)
    words.update(word for others in SYNONYMS.values() for word in others)
    return tuple(sorted(words))


def outline(shape: str, x: float, y: float, radius: float, edge: int = EDGE) -> Coverage:
    """How much of each pixel a shape covers, by the signed distance to its outline.

    Args:
        shape: a word of `SHAPES`.
        x: pixels from the left edge to the shape's centre of gravity.
        y: pixels from the top edge to it.
        radius: pixels, as in `RADIUS`.
        edge: width and height of the image in pixels.

    Returns:
        float32 of shape (edge, edge), 0 outside, 1 inside, in between on the anti-aliased edge.

    """
    rows, columns = np.mgrid[0:edge, 0:edge].astype(np.float32) + 0.5
    across, down = columns - x, rows - y
    reach = radius * _SCALE[shape]
    if shape == "circle":
        distance = np.hypot(across, down) - reach
    elif shape == "square":
        distance = np.maximum(np.abs(across), np.abs(down)) - reach
    else:
        sides = [across * normal[0] + down * normal[1] for normal in _TRIANGLE_NORMALS]
        distance = np.maximum.reduce(sides) - reach / 2
    cover: Coverage = np.clip(0.5 - distance, 0.0, 1.0).astype(np.float32)
    return cover


@cache
def scene_coverage(size: str, shape: str, place: str, dx: int = 0, dy: int = 0) -> Coverage:
    """Give the outline of a scene's shape, moved by (dx, dy) pixels; float32 (EDGE, EDGE)."""
    return outline(shape, PLACES[place] + dx, EDGE / 2 + dy, RADIUS[size])


def draw(scene: Scene, dx: int = 0, dy: int = 0) -> Pixels:
    """Draw the image of a scene, its shape moved by (dx, dy) pixels; uint8 (EDGE, EDGE, 3)."""
    cover = scene_coverage(scene.size, scene.shape, scene.place, dx, dy)[..., None]
    colour = np.array(PALETTE[scene.colour], np.float32)
    ground = np.array(PALETTE[scene.background], np.float32)
    return np.rint(ground + (colour - ground) * cover).astype(np.uint8)
