"""Images in a terminal, decoded from what is sent to it back to pixels."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from tests.actors.command.terminal import CELL, KITTY, NEITHER, SIXEL, Screen, run_on_terminal
from triptych.actors.command._draw import Canvas, Protocol, Sheet, Terminal, choose, fit, open_canvas, read_image

RED, BLUE = (220, 30, 40), (10, 20, 230)
PROTOCOLS: tuple[Protocol, ...] = ("kitty", "sixel", "blocks")


def halves(left: tuple[int, ...], right: tuple[int, ...], size: tuple[int, int] = (64, 48)) -> Image.Image:
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, size[0], size[1]))
    return image


def console_for(*, terminal: bool = True) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, color_system="truecolor", width=100, height=40)
    return console, text


def corners(pixels: np.ndarray) -> list[tuple[int, ...]]:
    """The colours in the middle of the left and of the right half."""
    height, width, _ = pixels.shape
    return [tuple(map(int, pixels[height // 2, width * part // 4])) for part in (1, 3)]


def near(found: list[tuple[int, ...]], *wanted: tuple[int, ...]) -> bool:
    return bool(np.abs(np.array(found) - np.array(wanted)).max() <= 3)  # sixels have colours in percent


def pixels_of(screen: Screen, protocol: Protocol) -> np.ndarray:
    if protocol == "blocks":
        return screen.block_pixels()
    ((_, pixels),) = screen.images.items()
    return pixels


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_image_is_drawn_and_the_next_one_over_it(protocol: Protocol) -> None:
    console, text = console_for()
    canvas = Canvas(console, Terminal(protocol, CELL))
    with Progress(console=console, transient=True, auto_refresh=False) as progress:
        bar = progress.add_task("denoising", total=4)
        console.print("before")
        for left, right in ((RED, BLUE), (BLUE, RED)):
            canvas.draw(halves(left, right))
            progress.advance(bar)
            progress.refresh()
        canvas.leave()
        console.print("after")
    screen = Screen().feed(text.getvalue())
    assert near(corners(pixels_of(screen, protocol)), BLUE, RED), "the second image is where the first was"
    words: dict[int, str] = {}
    for row, column in sorted(screen.cells):
        words[row] = words.get(row, "") + screen.cells[row, column][0]
    rows = {text.strip(): row for row, text in words.items()}
    columns, high = fit((64, 48), CELL, (99, 24))
    assert rows["after"] - rows["before"] == high + 1
    if protocol == "kitty":
        assert screen.sizes == [(columns, high)] * 2
    elif protocol == "sixel":
        assert pixels_of(screen, protocol).shape == (high * CELL[1], columns * CELL[0], 3)
    else:
        assert screen.block_pixels().shape == (2 * high, columns, 3)


def test_every_pixel_of_sixels_and_of_a_png_is_the_image_s() -> None:
    gradient = Image.fromarray(np.mgrid[0:64, 0:64].sum(0).astype(np.uint8)[..., None].repeat(3, 2))
    for protocol, most in (("kitty", 0), ("sixel", 4)):
        console, text = console_for()
        Canvas(console, Terminal(protocol, (64, 64))).draw(gradient)  # 24 rows of 64 pixels
        found = pixels_of(Screen().feed(text.getvalue()), protocol).astype(int)
        wanted = np.asarray(gradient.resize((found.shape[1], found.shape[0]))).astype(int)
        assert np.abs(found - wanted).max() <= most


def test_an_image_keeps_its_shape_and_fits() -> None:
    assert fit((1024, 1024), (10, 20), (99, 24)) == (48, 24)
    assert fit((4096, 64), (10, 20), (80, 24)) == (80, 1)
    assert fit((64, 4096), (10, 20), (80, 24)) == (1, 24)


def test_images_of_a_request_are_side_by_side() -> None:
    console, text = console_for()
    sheet = Sheet(Canvas(console, Terminal("kitty", CELL)))
    for index, colour in ((2, RED), (1, RED), (0, BLUE)):
        file = io.BytesIO()
        halves(colour, colour).save(file, "PNG")
        sheet.put(index, 3, file.getvalue() if index != 1 else b"no image")
    sheet.draw()
    ((_, pixels),) = Screen().feed(text.getvalue()).images.items()
    height, width, _ = pixels.shape
    quarters = [tuple(map(int, pixels[height * y // 4, width * x // 4])) for y in (1, 3) for x in (1, 3)]
    assert quarters == [BLUE, (0, 0, 0), RED, (0, 0, 0)]


@pytest.mark.parametrize(
    ("answers", "terminal"),
    [(KITTY, Terminal("kitty", CELL)), (SIXEL, Terminal("sixel", CELL)), (NEITHER, Terminal("blocks")),
     (b"", Terminal("blocks")), (b"\x1b[6;0;0t\x1b[?4c", Terminal("sixel"))],
)  # fmt: skip
def test_the_terminal_s_answers_choose(answers: bytes, terminal: Terminal) -> None:
    assert choose("auto", {"TERM": "xterm"}, lambda: answers) == terminal
    assert choose("sixel", {"TERM": "xterm"}, lambda: answers) == Terminal("sixel", terminal.cell)


def test_a_terminal_that_would_print_the_question_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> bytes:
        raise AssertionError("asked")

    assert choose("auto", {"TERM": "linux"}, ask) == Terminal("blocks")
    assert choose("blocks", {"TERM": "xterm"}, ask) == Terminal("blocks")
    console, _ = console_for(terminal=False)
    assert open_canvas("auto", console, ask) is None, "a file"
    assert open_canvas("off", console_for()[0], ask) is None
    plain = Console(file=io.StringIO(), force_terminal=True, no_color=True)
    monkeypatch.setenv("TERM", "dumb")
    assert open_canvas("auto", plain, ask) is None, "half blocks without colours show nothing"


def test_files_without_an_image_are_not_drawn(tmp_path: Path) -> None:
    import av

    file = tmp_path / "clip.mp4"
    with av.open(str(file), "w") as made:
        stream = made.add_stream("mpeg4", rate=4)
        stream.width, stream.height = 64, 48
        frame = av.VideoFrame.from_image(halves(RED, BLUE))
        made.mux(stream.encode(frame))
        made.mux(stream.encode(None))
    first = read_image(file.read_bytes())
    assert first is not None
    assert first.size == (64, 48)
    assert read_image(b"RIFF....WAVE") is None
    assert read_image(b"") is None


DRAWING = """
import sys
from PIL import Image
from rich.console import Console
from triptych.actors.command._draw import open_canvas
canvas = open_canvas(sys.argv[1], Console(stderr=True))
canvas.draw(Image.open(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("draw", "answers", "protocol"),
    [("auto", KITTY, "kitty"), ("auto", SIXEL, "sixel"), ("auto", NEITHER, "blocks"), ("auto", b"", "blocks"),
     ("sixel", KITTY, "sixel")],
)  # fmt: skip
def test_a_process_on_a_terminal_asks_and_draws(draw: str, answers: bytes, protocol: Protocol, tmp_path: Path) -> None:
    halves(RED, BLUE).save(tmp_path / "x.png")
    output, code = run_on_terminal((sys.executable, "-c", DRAWING, draw, str(tmp_path / "x.png")), answers)
    assert code == 0, output
    assert near(corners(pixels_of(Screen().feed(output), protocol)), RED, BLUE)
