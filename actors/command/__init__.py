"""The `triptych` command."""

from __future__ import annotations

import typer

from triptych.actors.command.add import add
from triptych.actors.command.check import check
from triptych.actors.command.generate import generate
from triptych.actors.command.reload import reload
from triptych.actors.command.sleep_wake import sleep, wake
from triptych.actors.command.status import status
from triptych.actors.command.up import up

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
for _command in (up, check, add, status, generate, reload, sleep, wake):
    app.command(no_args_is_help=_command is not status)(_command)


def main() -> None:
    """Run the command of this process' command line, and exit."""
    app()
