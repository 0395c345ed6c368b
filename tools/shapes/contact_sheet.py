"""Contact sheets: many small images on one, wrong ones framed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from triptych.tools.shapes.scenes import EDGE, Pixels

MARGIN = 4
PAPER = (200, 200, 200)
WRONG = (255, 0, 0)


def write_sheet(path: Path, images: Sequence[Pixels], right: Sequence[bool], columns: int = 16) -> None:
    """Write a PNG of all images, uint8 (EDGE, EDGE, 3), row by row; a red frame goes round each wrong one.

    Raises:
        ValueError: there are no images, or not as many verdicts as images.

    """
    if not images or len(images) != len(right):
        raise ValueError(f"one verdict per image is needed: {len(images)} images, {len(right)} verdicts")
    cell = EDGE + MARGIN
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell + MARGIN, rows * cell + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (image, good) in enumerate(zip(images, right, strict=True)):
        left, top = MARGIN + index % columns * cell, MARGIN + index // columns * cell
        if not good:
            pen.rectangle((left - 3, top - 3, left + EDGE + 2, top + EDGE + 2), fill=WRONG)
        sheet.paste(Image.fromarray(image), (left, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
