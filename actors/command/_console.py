"""How the commands speak: results on stdout; progress and one-sentence errors on stderr, with an exit code."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from triptych.actors.child_state import ChildState

EXIT_FAILED: Final = 1
EXIT_BAD_TOPOLOGY: Final = 2
EXIT_INTERRUPTED: Final = 130
_PIPE_WIDTH: Final = 200  # a program that reads a pipe wants whole lines

STYLES: Final[dict[str, str]] = {
    ChildState.STARTING: "yellow",
    ChildState.LOADING: "yellow",
    ChildState.JOINING: "yellow",
    ChildState.READY: "green",
    ChildState.WAKING: "yellow",
    ChildState.ASLEEP: "blue",
    ChildState.DRAINING: "cyan",
    ChildState.HUNG: "red",
    ChildState.CRASHED: "red",
    ChildState.BACKOFF: "yellow",
    ChildState.DELAYED: "bold yellow",
    ChildState.FAILED: "bold red",
    ChildState.GAVE_UP: "bold red",
    ChildState.STOPPED: "dim",
    ChildState.DOWN: "red",
}


def stdout() -> Console:
    """Return the console for what was asked for."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def stderr() -> Console:
    """Return the console for progress, warnings and errors; its lines are not wrapped."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def fail(sentence: str, code: int) -> NoReturn:
    """Print one sentence to stderr and exit with `code`."""
    stderr().print(sentence, style="red", markup=False)
    raise typer.Exit(code)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table in the style of the commands; cells are rich markup."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def styled(state: str) -> str:
    """Return a state in its colour, as rich markup."""
    style = STYLES.get(state)
    return f"[{style}]{state}[/]" if style else state
