"""`triptych sleep` and `triptych wake`: drop or load the weights of a model."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Final

import typer

from triptych.actors.command._console import EXIT_BAD_TOPOLOGY, EXIT_FAILED, EXIT_INTERRUPTED, fail, stderr
from triptych.actors.command.check import TopologyFile
from triptych.actors.errors import TopologyError
from triptych.actors.runtime.address_book import AddressBook
from triptych.actors.topology import load_topology
from triptych.bus import BusError, Outbox, RemoteError
from triptych.roles.messages.weights import ModelStatus, SleepModel, WakeModel

if TYPE_CHECKING:
    from rich.console import Console

    from triptych.actors.topology import Topology

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
    try:
        topology = load_topology(file)
    except TopologyError as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    console = stderr()
    try:
        model_status = asyncio.run(_wait_for_state(topology, name, console, awake=awake))
    except RemoteError as error:
        fail(error.detail, EXIT_FAILED)
    except BusError as error:
        fail(f"The head of {file} cannot be reached: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        fail("It goes on in the background; `triptych status` shows it.", EXIT_INTERRUPTED)
    weights = f", with {model_status.weights / 2**20:,.1f} MiB of weights" if awake else ""
    console.print(f"{model_status.model} is {model_status.state}{weights}.")


async def _wait_for_state(topology: Topology, name: str, console: Console, *, awake: bool) -> ModelStatus:
    address_book = AddressBook(topology)
    outbox = Outbox("sleep", options=address_book.socket_options)
    try:
        head = outbox.reference("head", address_book.address("head"))
        wanted = "loaded" if awake else "asleep"
        with console.status("Asking the head") as progress:
            message = WakeModel(name) if awake else SleepModel(name)
            answer = await head.ask(message, ModelStatus, timeout_s=_ANSWER_TIMEOUT_S)
            while answer.state != wanted:
                progress.update(f"{answer.model} is {answer.state}{answer.trouble and ': '}{answer.trouble}")
                await asyncio.sleep(_ASK_EVERY_S)
                # Told once: a request may meanwhile wake or replace it, and that is not undone.
                answer = await head.ask(SleepModel(name, begins=False), ModelStatus, timeout_s=_ANSWER_TIMEOUT_S)
        return answer
    finally:
        outbox.close()
