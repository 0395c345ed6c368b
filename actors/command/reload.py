"""`triptych reload`: serve a model whose files have changed, without stopping the system."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Final

import typer

from triptych.actors.command._console import stderr
from triptych.actors.command._head import ask_head
from triptych.actors.command.check import TopologyFile
from triptych.roles.messages.weights import Reloading, ReloadModel

if TYPE_CHECKING:
    from rich.status import Status

    from triptych.bus import Reference

_ASK_EVERY_S: Final = 0.5
_ANSWER_TIMEOUT_S: Final = 30.0


def reload(
    file: TopologyFile,
    name: Annotated[
        str, typer.Argument(metavar="[MODEL]", help="The name of one model; default: all.", show_default=False)
    ] = "",
) -> None:
    """Restart the instances of a running system with the model's files as they are on disk now.

    Instances restart one after the other, each when it is idle: requests that began with the earlier weights end with
    them. Waits until all are done; Ctrl-C ends the wait, not the restarts. Exits with 1 when the head cannot be reached
    or refuses.

    [bold]Example[/]

    triptych reload examples/demo.toml
    """
    answer = ask_head(
        file,
        "reload",
        lambda head, status: _reload(head, status, name),
        interrupted="The restarts go on; `triptych status` shows them.",
    )
    stderr().print(summarize(answer))


def summarize(answer: Reloading) -> str:
    """Say how a reload ended. Pure."""
    version = f"the weights that are on disk ({answer.model})"
    if answer.joined >= answer.total:
        return f"All {answer.total} instances have {version}."
    if not answer.joined:
        return f"No instance has joined the head: each loads {version} when it starts."
    return f"{answer.joined} of {answer.total} instances have {version}; the others load them when they start."


async def _reload(head: Reference, status: Status, name: str) -> Reloading:
    while True:
        answer = await head.ask(ReloadModel(name), Reloading, timeout_s=_ANSWER_TIMEOUT_S)
        if not answer.instances:
            return answer
        status.update(f"Restarting {', '.join(answer.instances)}")
        await asyncio.sleep(_ASK_EVERY_S)
