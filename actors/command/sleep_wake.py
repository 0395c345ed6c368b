"""`triptych sleep` and `triptych wake`: drop or load the weights of a model."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Final

import typer

from triptych.actors.command._console import stderr
from triptych.actors.command._head import ask_head
from triptych.actors.command.check import TopologyFile
from triptych.roles.messages.weights import ModelStatus, SleepModel, WakeModel

if TYPE_CHECKING:
    from rich.status import Status

    from triptych.bus import Reference

_ASK_EVERY_S: Final = 0.2
_ANSWER_TIMEOUT_S: Final = 5.0

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="The name of the model.", show_default=False)]


def sleep(file: TopologyFile, name: ModelName) -> None:
    """Free the memory of a model that is not needed now; a request for it wakes it.

    Running requests are finished first. Waits until the model sleeps; Ctrl-C ends only the wait. Exits with 1 when the
    head cannot be reached or refuses.

    [bold]Example[/]

    triptych sleep examples/two_models.toml shapes
    """
    _change_state(file, name, awake=False)


def wake(file: TopologyFile, name: ModelName) -> None:
    """Load the weights of a model into memory before a request needs them.

    Waits until they are loaded; Ctrl-C ends only the wait. Exits with 1 when the head cannot be reached or refuses.

    [bold]Example[/]

    triptych wake examples/two_models.toml shapes
    """
    _change_state(file, name, awake=True)


def _change_state(file: TopologyFile, name: str, *, awake: bool) -> None:
    answer = ask_head(
        file,
        "sleep",
        lambda head, status: _wait_for_state(head, status, name, awake=awake),
        interrupted="It goes on in the background; `triptych status` shows it.",
    )
    weights = f", with {answer.weights / 2**20:,.1f} MiB of weights" if awake else ""
    stderr().print(f"{answer.model} is {answer.state}{weights}.")


async def _wait_for_state(head: Reference, status: Status, name: str, *, awake: bool) -> ModelStatus:
    wanted = "loaded" if awake else "asleep"
    message = WakeModel(name) if awake else SleepModel(name)
    answer = await head.ask(message, ModelStatus, timeout_s=_ANSWER_TIMEOUT_S)
    while answer.state != wanted:
        status.update(f"{answer.model} is {answer.state}{answer.trouble and ': '}{answer.trouble}")
        await asyncio.sleep(_ASK_EVERY_S)
        # Told once: a request may meanwhile wake or replace it, and that is not undone.
        answer = await head.ask(SleepModel(name, begins=False), ModelStatus, timeout_s=_ANSWER_TIMEOUT_S)
    return answer
