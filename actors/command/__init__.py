"""The `triptych` command, on top of everything else. It exports `app`, for tests, and `main`.

To add a command, write its function in a module of its own, with an example in its docstring, and name it in
`_COMMANDS`.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer
from typer._completion_classes import completion_init

from triptych.actors.command._console import EXIT_INTERRUPTED, fail, stdout
from triptych.actors.command.bench import bench
from triptych.actors.command.check import check
from triptych.actors.command.completion import completion
from triptych.actors.command.generate import generate
from triptych.actors.command.init import init
from triptych.actors.command.keys import keys
from triptych.actors.command.logs import logs
from triptych.actors.command.manifests import manifests
from triptych.actors.command.reload import reload
from triptych.actors.command.sleep_wake import sleep, wake
from triptych.actors.command.status import status
from triptych.actors.command.up import up

__all__ = ["app", "main"]

_COMMANDS: Final[tuple[Callable[..., None], ...]] = (
    *(init, check, up, status, logs, generate, bench, reload, sleep, wake, keys, manifests, completion),
)
_WITHOUT_ARGUMENTS: Final = (status, logs, bench)
"""Commands that do something without any argument."""

app = typer.Typer(
    name="triptych",
    help="Serve diffusion models as three supervised pools: encoder, denoiser, decoder.",
    epilog="Start with: triptych up examples/demo.toml",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        stdout().print(f"triptych {importlib.metadata.version('triptych')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Take the options of the command as a whole."""


def _ended_by_ctrl_c(command: Callable[..., None]) -> Callable[..., None]:
    """Make Ctrl-C end `command` with a sentence and exit code 130, unless it handles it itself."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except KeyboardInterrupt:
            fail("Interrupted.", EXIT_INTERRUPTED)

    return run


for _command in _COMMANDS:
    app.command(no_args_is_help=_command not in _WITHOUT_ARGUMENTS)(_ended_by_ctrl_c(_command))
app.command("add", hidden=True, no_args_is_help=True)(_ended_by_ctrl_c(init))  # what init was called before


def main() -> None:
    """Run the command line of this process, and exit."""
    completion_init()
    app()
