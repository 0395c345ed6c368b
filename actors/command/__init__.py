"""The `triptych` command."""

from __future__ import annotations

import typer

from actors.command.add import add
from actors.command.check import check
from actors.command.generate import generate
from actors.command.reload import reload
from actors.command.sleeping import sleep, wake
from actors.command.status import status
from actors.command.up import up

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
