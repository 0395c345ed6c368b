"""Contact sheets: many small pictures on one, wrong ones framed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from triptych.tools.shapes.scenes import EDGE, Pixels

MARGIN = 4
PAPER = (200, 200, 200)
WRONG = (255, 0, 0)


def write_sheet(path: Path, pictures: Sequence[Pixels], right: Sequence[bool], columns: int = 16) -> None:
    """Write a PNG of all pictures, uint8 (EDGE, EDGE, 3), row by row; a red frame goes round each wrong one.

    Raises:
        ValueError: there are no pictures, or not as many verdicts as pictures.

    """
    if not pictures or len(pictures) != len(right):
        raise ValueError(f"one verdict per picture is needed: {len(pictures)} pictures, {len(right)} verdicts")
    cell = EDGE + MARGIN
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * cell + MARGIN, rows * cell + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    for index, (picture, good) in enumerate(zip(pictures, right, strict=True)):
        left, top = MARGIN + index % columns * cell, MARGIN + index // columns * cell
        if not good:
            pen.rectangle((left - 3, top - 3, left + EDGE + 2, top + EDGE + 2), fill=WRONG)
        sheet.paste(Image.fromarray(picture), (left, top))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)
