"""A small terminal: it answers what it is asked, and knows which pixels are where on its screen."""

from __future__ import annotations

import base64
import io
import os
import pty
import re
import select
import struct
import termios
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from fcntl import ioctl
from typing import Any

import numpy as np
from PIL import Image

from triptych.actors.command._draw import QUERY

COLUMNS, ROWS = 100, 40
CELL = (10, 20)
KITTY = b"\x1b_Gi=31;OK\x1b\\\x1b[6;20;10t\x1b[?62;4c"
SIXEL = b"\x1b[6;20;10t\x1b[?62;4;22c"
NEITHER = b"\x1b[?62;22c"

_TOKEN = re.compile(
    r"\x1b_G(?P<kitty>.*?)\x1b\\|\x1bP(?P<sixel>.*?)\x1b\\|\x1b\[(?P<values>[?\d;]*)(?P<command>[A-Za-z])"
    r"|\x1b(?P<saved>[78])|(?P<text>[^\x1b])",
    re.DOTALL,
)
_SIXEL = re.compile(r'"1;1;(\d+);(\d+)|#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|!(\d+)([?-~])|([?-~])|(\$)|(-)')


@dataclass
class Screen:
    """What a terminal shows after some output; rows count from the first, and nothing scrolls."""

    row: int = 0
    column: int = 0
    cells: dict[tuple[int, int], tuple[str, Any, Any]] = field(default_factory=dict)
    """By row and column: the character, its colour and that of its background."""
    images: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    """By row and column of the upper left corner: pixels, (height, width, 3)."""
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """Columns and rows that kitty's images were asked to have, in the order in which they came."""
    drawn: int = 0
    _saved: tuple[int, int] = (0, 0)
    _colours: tuple[Any, Any] = (None, None)
    _data: str = ""

    def feed(self, output: str) -> Screen:
        for token in _TOKEN.finditer(output):
            if token["kitty"] is not None:
                self._kitty(token["kitty"])
            elif token["sixel"] is not None:
                self._put(sixel_pixels(token["sixel"]))
            elif token["command"]:
                self._control(token["values"], token["command"])
            elif token["saved"] == "7":
                self._saved = (self.row, self.column)
            elif token["saved"] == "8":
                self.row, self.column = self._saved
            else:
                self._text(token["text"])
        return self

    def block_pixels(self) -> np.ndarray:
        """The pixels of all half blocks, as (height, width, 3)."""
        blocks = {at: (upper, lower) for at, (text, upper, lower) in self.cells.items() if text == "▀"}
        first, last = min(row for row, _ in blocks), max(row for row, _ in blocks)
        width = max(column for _, column in blocks) + 1
        rows = []
        for row in range(first, last + 1):
            rows += [[blocks[row, column][half] for column in range(width)] for half in (0, 1)]
        return np.array(rows, np.uint8)

    def _put(self, pixels: np.ndarray) -> None:
        self.images[self.row, self.column] = pixels
        self.drawn += 1

    def _kitty(self, command: str) -> None:
        keys, _, data = command.partition(";")
        values = dict(pair.split("=") for pair in keys.split(","))
        if values.get("a") == "q":
            return
        if values.get("a") == "T":
            assert (values["f"], values["C"]) == ("100", "1")
            self._data = ""
            self.sizes.append((int(values["c"]), int(values["r"])))
        assert len(data) <= 4096
        self._data += data
        if values["m"] == "0":
            image = Image.open(io.BytesIO(base64.b64decode(self._data)))
            self.images.clear()  # they have the id of this one
            self._put(np.asarray(image.convert("RGB")))

    def _control(self, values: str, command: str) -> None:
        if values.startswith("?"):
            return
        numbers = [int(value or 0) for value in values.split(";")]
        if command == "A":
            self.row -= max(1, numbers[0])
        elif command == "B":
            self.row += max(1, numbers[0])
        elif command == "J":
            self.cells = {at: cell for at, cell in self.cells.items() if at < (self.row, self.column)}
            self.images = {at: image for at, image in self.images.items() if at < (self.row, self.column)}
        elif command == "K":
            self.cells = {at: cell for at, cell in self.cells.items() if at[0] != self.row}
        elif command == "m":
            self._style(numbers)

    def _style(self, numbers: Sequence[int]) -> None:
        fore, back = self._colours
        rest = list(numbers)
        while rest:
            number = rest.pop(0)
            if number in (38, 48) and rest[:1] == [2]:
                colour, rest = tuple(rest[1:4]), rest[4:]
                fore, back = (colour, back) if number == 38 else (fore, colour)
            elif number == 0:
                fore, back = None, None
        self._colours = fore, back

    def _text(self, text: str) -> None:
        if text == "\n":
            self.row, self.column = self.row + 1, 0
        elif text == "\r":
            self.column = 0
        else:
            self.cells[self.row, self.column] = (text, *self._colours)
            self.column += 1


def sixel_pixels(data: str) -> np.ndarray:
    """Decode sixels, as (height, width, 3)."""
    palette: dict[int, tuple[int, ...]] = {}
    pixels = np.zeros((0, 0, 3), np.uint8)
    x = y = colour = 0
    for found in _SIXEL.finditer(data.partition("q")[2]):
        width, height, defined, red, green, blue, chosen, times, repeated, single, back, down = found.groups()
        if width:
            pixels = np.zeros((int(height) + 6, int(width), 3), np.uint8)
            end = int(height)
        elif defined:
            palette[int(defined)] = tuple(round(int(value) * 255 / 100) for value in (red, green, blue))
        elif chosen:
            colour = int(chosen)
        elif back or down:
            x, y = 0, y + 6 * bool(down)
        else:
            bits, count = ord(repeated or single) - 63, int(times or 1)
            for bit in range(6):
                if bits >> bit & 1:
                    pixels[y + bit, x : x + count] = palette[colour]
            x += count
    return pixels[:end]


def run_on_terminal(command: Sequence[str], answers: bytes, *, within_s: float = 60.0) -> tuple[str, int]:
    """Run a command whose terminal answers the query so; returns its output and its exit code."""
    pid, descriptor = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", COLORTERM="truecolor", COLUMNS=str(COLUMNS), LINES=str(ROWS))
        os.execv(command[0], command)
    ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    output, answered, end = b"", False, time.monotonic() + within_s
    try:
        while (left := end - time.monotonic()) > 0 and select.select([descriptor], [], [], left)[0]:
            try:
                part = os.read(descriptor, 1 << 16)
            except OSError:  # the command has ended
                break
            output += part
            if not answered and QUERY in output:
                os.write(descriptor, answers)
                answered = True
    finally:
        os.close(descriptor)
        _, status = os.waitpid(pid, 0)
    return output.replace(b"\r\n", b"\n").decode(), os.waitstatus_to_exitcode(status)
