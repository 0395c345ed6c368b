"""How the commands speak: sentences to stderr with an exit code, tables to stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

import typer
from rich.console import Console
from rich.table import Table

from triptych.actors.child_state import ChildState

if TYPE_CHECKING:
    from collections.abc import Sequence

EXIT_FAILED: Final = 1
EXIT_BAD_TOPOLOGY: Final = 2
EXIT_INTERRUPTED: Final = 130
_PIPE_WIDTH: Final = 200  # what reads a pipe wants whole lines

STYLES: Final[dict[str, str]] = {
    ChildState.READY: "green",
    ChildState.LOADING: "yellow",
    ChildState.WAKING: "yellow",
    ChildState.ASLEEP: "blue",
    ChildState.STARTING: "yellow",
    ChildState.BACKOFF: "yellow",
    ChildState.DRAINING: "cyan",
    ChildState.STOPPED: "dim",
    ChildState.FAILED: "bold red",
    ChildState.GAVE_UP: "bold red",
    ChildState.DOWN: "red",
    ChildState.HUNG: "red",
}


def stdout() -> Console:
    """The console for what was asked for."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console


def fail(sentence: str, code: int) -> NoReturn:
    """Print one sentence to stderr and exit."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(sentence, style="red", markup=False)
    raise typer.Exit(code)


def table(*columns: str) -> Table:
    """An empty table in the style of the commands."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def styled(state: str) -> str:
    """A state in its colour, as rich markup."""
    style = STYLES.get(state)
    return f"[{style}]{state}[/]" if style else state


def rows_of(made: Table, rows: Sequence[Sequence[str]]) -> Table:
    """The table with rows."""
    for row in rows:
        made.add_row(*row)
    return made
