"""`triptych reload`: serve a model whose files have changed, without stopping the system."""

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
from triptych.roles.messages.weights import Reloading, ReloadModel

if TYPE_CHECKING:
    from rich.console import Console

    from triptych.actors.topology import Topology

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
    try:
        topology = load_topology(file)
    except TopologyError as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    console = stderr()
    try:
        answer = asyncio.run(_reload(topology, name, console))
    except RemoteError as error:
        fail(error.detail, EXIT_FAILED)
    except BusError as error:
        fail(f"The head of {file} cannot be reached: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        fail("The restarts go on; `triptych status` shows them.", EXIT_INTERRUPTED)
    console.print(summarize(answer))


def summarize(answer: Reloading) -> str:
    """Say how a reload ended. Pure."""
    version = f"the weights that are on disk ({answer.model})"
    if answer.joined >= answer.total:
        return f"All {answer.total} instances have {version}."
    if not answer.joined:
        return f"No instance has joined the head: each loads {version} when it starts."
    return f"{answer.joined} of {answer.total} instances have {version}; the others load them when they start."


async def _reload(topology: Topology, name: str, console: Console) -> Reloading:
    address_book = AddressBook(topology)
    outbox = Outbox("reload", options=address_book.socket_options)
    try:
        head = outbox.reference("head", address_book.address("head"))
        with console.status("Asking the head") as progress:
            while True:
                answer = await head.ask(ReloadModel(name), Reloading, timeout_s=_ANSWER_TIMEOUT_S)
                if not answer.instances:
                    return answer
                progress.update(f"Restarting {', '.join(answer.instances)}")
                await asyncio.sleep(_ASK_EVERY_S)
    finally:
        outbox.close()
