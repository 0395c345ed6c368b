"""`triptych completion`: what a shell needs to complete the command line."""

from __future__ import annotations

from typing import Annotated, Literal

import typer
from typer._completion_shared import get_completion_script

Shell = Literal["bash", "zsh", "fish"]


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.", show_default=False)],
) -> None:
    """Print a script with which a shell completes commands, options and the names of running components.

    [bold]Examples[/]

    eval "$(triptych completion bash)"                                              # in ~/.bashrc

    triptych completion zsh > ~/.zfunc/_triptych                                    # a folder of $fpath

    triptych completion fish > ~/.config/fish/completions/triptych.fish
    """
    print(get_completion_script(prog_name="triptych", complete_var="_TRIPTYCH_COMPLETE", shell=shell))
