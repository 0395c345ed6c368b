"""`triptych sleep` and `triptych wake`: whether a model's weights are in memory, by hand."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from triptych.actors.command._console import EXIT_BAD_TOPOLOGY, EXIT_FAILED, EXIT_INTERRUPTED, fail
from triptych.actors.command.check import TopologyFile
from triptych.actors.errors import TopologyError
from triptych.actors.runtime.address_book import AddressBook
from triptych.actors.runtime.system_messages import ModelStatus, SleepModel, WakeModel
from triptych.actors.topology import load_topology
from triptych.bus import BusError, Outbox, RemoteError

if TYPE_CHECKING:
    from triptych.actors.topology import Topology

_LOOK_EVERY_S: Final = 0.2
_ANSWER_S: Final = 5.0

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Its name.", show_default=False)]


def sleep(file: TopologyFile, name: ModelName) -> None:
    """Free the memory of a model that nobody needs just now; a request for it wakes it.

    What is under way is finished first. Waits until it sleeps; Ctrl-C ends the wait alone. Exits with 1 when the head
    cannot be reached or refuses.

    [bold]Example[/]

    triptych sleep examples/two_models.toml shapes
    """
    _change_state(file, name, awake=False)


def wake(file: TopologyFile, name: ModelName) -> None:
    """Bring the weights of a model into memory before it is asked for.

    Waits until they are there; Ctrl-C ends the wait alone. Exits with 1 when the head cannot be reached.

    [bold]Example[/]

    triptych wake examples/two_models.toml shapes
    """
    _change_state(file, name, awake=True)


def _change_state(file: TopologyFile, name: str, *, awake: bool) -> None:
    try:
        topology = load_topology(file)
    except TopologyError as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    console = Console(stderr=True, highlight=False)
    try:
        model_status = asyncio.run(_wait_for_state(topology, name, console, awake=awake))
    except RemoteError as error:
        fail(error.detail, EXIT_FAILED)
    except BusError as error:
        fail(f"The head of {file} cannot be reached: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        fail("It goes on; `triptych status` shows it.", EXIT_INTERRUPTED)
    weights = f", with {model_status.weights / 2**20:,.1f} MiB of weights" if awake else ""
    console.print(f"{model_status.model} is {model_status.state}{weights}.")


async def _wait_for_state(topology: Topology, name: str, console: Console, *, awake: bool) -> ModelStatus:
    address_book = AddressBook(topology)
    outbox = Outbox("sleep", curve=address_book.keys)
    try:
        head = outbox.reference("head", address_book.address("head"))
        wanted = "loaded" if awake else "asleep"
        with console.status("Asking the head") as shown:
            message = WakeModel(name) if awake else SleepModel(name)
            answer = await head.ask(message, ModelStatus, timeout_s=_ANSWER_S)
            while answer.state != wanted:
                shown.update(f"{answer.model} is {answer.state}{answer.trouble and ': '}{answer.trouble}")
                await asyncio.sleep(_LOOK_EVERY_S)
                # Asked once: a request may turn it again meanwhile, and that is not undone.
                answer = await head.ask(SleepModel(name, begins=False), ModelStatus, timeout_s=_ANSWER_S)
        return answer
    finally:
        outbox.close()
