"""Draw images in a terminal: by kitty's graphics protocol, as sixels, or as half blocks in 24-bit colour.

The package for it, textual-image, asks the terminal on stdout when it is imported, whatever was chosen, and its newer
versions need Python 3.12.
"""

from __future__ import annotations

import base64
import io
import math
import os
import re
import select
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, cast

from rich.color import Color
from rich.segment import ControlType, Segment
from rich.style import Style

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import Console, ConsoleOptions, RenderResult

Draw = Literal["auto", "kitty", "sixel", "blocks", "off"]
Protocol = Literal["kitty", "sixel", "blocks"]

ANSWER_S: Final = 0.5
"""Longest wait for the answers of a terminal."""
QUERY: Final = b"\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[16t\x1b[c"
"""Asks for kitty's graphics protocol, for the pixels of a cell, and for what every terminal answers: what it is."""
_KITTY: Final = re.compile(rb"\x1b_Gi=31;OK\x1b\\")
_CELL: Final = re.compile(rb"\x1b\[6;(\d+);(\d+)t")
_ATTRIBUTES: Final = re.compile(rb"\x1b\[\?([\d;]*)c")
_SIXEL: Final = b"4"
"""Among the attributes of a terminal."""
_MUTE: Final = frozenset({"dumb", "linux", "unknown"})
"""Values of TERM for terminals that show a question in place of answering it."""
_USUAL_CELL: Final = (8, 16)
_MOST_ROWS: Final = 24
_ROWS_BELOW: Final = 3
"""Rows that are left for the bar of steps and the prompt of the shell."""
_CHUNK: Final = 4096
"""Most bytes of base64 in one command of kitty's protocol."""
_SIXEL_ROWS: Final = 6
_NO_PIXEL: Final = 63
"""The character of a sixel without any of its six pixels; each adds its bit."""
_COLOURS: Final = 256


class Terminal(NamedTuple):
    """What a terminal can show."""

    protocol: Protocol
    """The best that it takes."""
    cell: tuple[int, int] = _USUAL_CELL
    """Width and height of a character, in pixels."""


class Canvas:
    """A place in the terminal where an image is drawn, and then the next one over it."""

    def __init__(self, console: Console, terminal: Terminal) -> None:
        self._console = console
        self._terminal = terminal
        self._rows = 0
        """Rows above the cursor that the last image has."""

    def draw(self, image: Image) -> None:
        """Draw an image in place of the one before."""
        room = (self._console.width - 1, max(1, min(_MOST_ROWS, self._console.height - _ROWS_BELOW)))
        drawing = _Drawing(image.convert("RGB"), self._terminal, room, above=self._rows)
        self._console.print(drawing)
        self._rows = drawing.rows

    def leave(self) -> None:
        """Keep what is drawn: something else was printed below, and the next image comes after that."""
        self._rows = 0


class _Drawing:
    """One image, for rich to print: it ends at the beginning of the row below."""

    def __init__(self, image: Image, terminal: Terminal, room: tuple[int, int], above: int) -> None:
        self.columns, self.rows = fit(image.size, terminal.cell, room)
        self._image = image
        self._terminal = terminal
        self._above = above

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        del console, options
        if self._above:
            yield _raw(f"\r\x1b[{self._above}A\x1b[J")
        if self._terminal.protocol == "blocks":
            yield from blocks(self._image.resize((self.columns, 2 * self.rows)))
            return
        # The rows are there before the image, which would otherwise scroll the screen while it is drawn.
        width, height = self._terminal.cell
        size = (self.columns * width, self.rows * height)
        if self._terminal.protocol == "kitty":
            drawn = kitty(self._image, self.columns, self.rows, size)
        else:
            drawn = sixels(self._image.resize(size))
        yield _raw("\n" * self.rows + f"\x1b[{self.rows}A\x1b7{drawn}\x1b8\x1b[{self.rows}B")


def _raw(text: str) -> Segment:
    """Make a segment that rich sends as it is: a control code, with one that does nothing as its name."""
    return Segment(text, None, [(ControlType.CURSOR_FORWARD, 0)])


def fit(size: tuple[int, int], cell: tuple[int, int], room: tuple[int, int]) -> tuple[int, int]:
    """Return the columns and rows of an image of `size` pixels: as large as the room allows, in its shape. Pure."""
    width, height = size[0] / cell[0], size[1] / cell[1]
    scale = min(room[0] / width, room[1] / height)
    return max(1, min(room[0], round(width * scale))), max(1, min(room[1], round(height * scale)))


def blocks(image: Image) -> Iterator[Segment]:
    """Yield half blocks for an RGB image of an even height: two rows of pixels for each row of text."""
    width, height = image.size
    pixels = image.tobytes()
    for row in range(0, height, 2):
        for column in range(width):
            upper, lower = (3 * ((row + below) * width + column) for below in (0, 1))
            colours = (Color.from_rgb(*pixels[start : start + 3]) for start in (upper, lower))
            yield Segment("▀", Style(color=next(colours), bgcolor=next(colours)))
        yield Segment.line()


def kitty(image: Image, columns: int, rows: int, most: tuple[int, int]) -> str:
    """Return an image for kitty's graphics protocol: a PNG of at most `most` pixels, over so many cells.

    Each process has one image in the terminal's memory: the next one takes the place of the one before.
    """
    smaller = image.copy()
    smaller.thumbnail(most)
    file = io.BytesIO()
    smaller.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    heads = [f"a=T,f=100,i={os.getpid()},c={columns},r={rows},C=1,q=2,", *("q=2," for _ in chunks[1:])]
    more = [1] * (len(chunks) - 1) + [0]
    return "".join(
        f"\x1b_G{head}m={follows};{chunk}\x1b\\" for head, follows, chunk in zip(heads, more, chunks, strict=True)
    )


def sixels(image: Image) -> str:
    """Return an RGB image as sixels, in the 256 colours that fit it best."""
    import numpy as np

    paletted = image.quantize(_COLOURS)
    palette = np.asarray(paletted.getpalette(), np.uint8).reshape(-1, 3)
    pixels = np.asarray(paletted)
    height, width = pixels.shape
    parts = [f'\x1bP0;1q"1;1;{width};{height}']
    for colour in np.unique(pixels):
        red, green, blue = (round(100 * int(value) / 255) for value in palette[colour])
        parts.append(f"#{colour};2;{red};{green};{blue}")
    bands = []
    for top in range(0, height, _SIXEL_ROWS):
        band = pixels[top : top + _SIXEL_ROWS]
        bits = (1 << np.arange(len(band), dtype=np.uint8))[:, None]
        colours = np.unique(band)
        rows = ((band == colours[:, None, None]) * bits).sum(1, dtype=np.uint8) + _NO_PIXEL
        texts = (row.tobytes().decode().rstrip(chr(_NO_PIXEL)) for row in rows)
        bands.append("$".join(f"#{colour}{_runs(text)}" for colour, text in zip(colours, texts, strict=True)))
    return "".join([*parts, "-".join(bands), "\x1b\\"])


def _runs(text: str) -> str:
    """Write four or more equal characters as their number and one of them."""
    return re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", text)


class Sheet:
    """The newest image of each job of a request, side by side on a canvas."""

    def __init__(self, canvas: Canvas) -> None:
        self._canvas = canvas
        self._images: dict[int, Image] = {}
        self._count = 0

    def put(self, index: int, count: int, data: bytes) -> None:
        """Take a file as the newest of one of `count` jobs, if it has an image; `draw` shows it."""
        image = read_image(data)
        if image is not None:
            self._images[index] = image
            self._count = count

    def draw(self) -> None:
        """Draw all images that there are."""
        if self._images:
            self._canvas.draw(side_by_side([self._images.get(each) for each in range(self._count)]))

    def leave(self) -> None:
        """Keep what is drawn, as `Canvas.leave`."""
        self._canvas.leave()


def side_by_side(images: Sequence[Image | None]) -> Image:
    """Put images side by side, in rows, with an empty place for each that is missing; one at least is there. Pure."""
    from PIL import Image as Images

    there = [image for image in images if image is not None]
    if len(images) == 1:
        return there[0]
    width, height = max(image.width for image in there), max(image.height for image in there)
    columns = math.ceil(math.sqrt(len(images)))
    whole = Images.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for place, image in enumerate(images):
        if image is not None:
            whole.paste(image.convert("RGB"), ((place % columns) * width, (place // columns) * height))
    return whole


def open_canvas(draw: Draw, console: Console, ask: Callable[[], bytes] | None = None) -> Canvas | None:
    """Return where images are drawn; None where they are not, such as in a file or a terminal without colours.

    Args:
        draw: What the user wants; with "auto" the terminal is asked what it can.
        console: Of the terminal.
        ask: Returns the terminal's answers to `QUERY`.
    """
    if draw == "off" or not console.is_terminal:
        return None
    terminal = choose(draw, os.environ, ask or ask_terminal)
    if terminal.protocol == "blocks" and (console.no_color or console.color_system in (None, "standard")):
        return None
    return Canvas(console, terminal)


def choose(draw: Draw, environment: Mapping[str, str], ask: Callable[[], bytes]) -> Terminal:
    """Return what is drawn, and the pixels of a cell.

    Args:
        draw: Not "off".
        environment: Of this process.
        ask: Returns the terminal's answers to `QUERY`; not called if it would print the question.
    """
    mute = environment.get("TERM", "dumb") in _MUTE
    able = read_answers(b"" if mute or draw == "blocks" else ask())
    return able if draw == "auto" else Terminal(cast("Protocol", draw), able.cell)


def read_answers(answers: bytes) -> Terminal:
    """Return what a terminal can, by its answers to `QUERY`. Pure."""
    cell = _CELL.search(answers)
    attributes = _ATTRIBUTES.search(answers)
    protocol: Protocol = "blocks"
    if _KITTY.search(answers):
        protocol = "kitty"
    elif attributes and _SIXEL in attributes[1].split(b";"):
        protocol = "sixel"
    return Terminal(protocol, (int(cell[2]), int(cell[1])) if cell and int(cell[1]) and int(cell[2]) else _USUAL_CELL)


def ask_terminal() -> bytes:
    """Return the answers of this process's terminal to `QUERY`; b"" if there is none that can be asked."""
    try:
        descriptor = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # a process without a terminal
        return b""
    try:
        if os.tcgetpgrp(descriptor) != os.getpgrp():
            return b""  # in the background: who asks would be stopped
        return _ask(descriptor)
    except (OSError, termios.error):  # the terminal has gone
        return b""
    finally:
        os.close(descriptor)


def _ask(descriptor: int) -> bytes:
    """Send `QUERY`, and read until what comes last, the attributes, or until `ANSWER_S` have passed."""
    before = termios.tcgetattr(descriptor)
    end, answers = time.monotonic() + ANSWER_S, b""
    try:
        tty.setcbreak(descriptor, termios.TCSANOW)
        os.write(descriptor, QUERY)
        while not _ATTRIBUTES.search(answers):
            readable, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            if not readable or not (part := os.read(descriptor, _CHUNK)):
                break
            answers += part
    finally:
        # Answers that come too late would be typed at the prompt of the shell.
        in_time = _ATTRIBUTES.search(answers)
        termios.tcsetattr(descriptor, termios.TCSANOW if in_time else termios.TCSAFLUSH, before)
    return answers


def read_image(data: bytes) -> Image | None:
    """Return the image in a file, of a video the first; None for what has none, such as sound."""
    import av
    from PIL import Image as Images
    from PIL import UnidentifiedImageError

    try:
        image = Images.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError:
        pass
    else:
        return image
    try:
        with av.open(io.BytesIO(data), mode="r") as video:
            return next((frame.to_image() for frame in video.decode(video=0)), None)  # type: ignore[no-untyped-call]
    except (av.FFmpegError, IndexError):  # not a video, or one without a picture
        return None
