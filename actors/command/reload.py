"""`triptych reload`: take over a model whose files have changed, without a stop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from triptych.actors.command._console import EXIT_BAD_TOPOLOGY, EXIT_FAILED, EXIT_INTERRUPTED, fail
from triptych.actors.command.check import TopologyFile
from triptych.actors.errors import TopologyError
from triptych.actors.runtime.address_book import AddressBook
from triptych.actors.runtime.system_messages import Reloading, ReloadModel
from triptych.actors.topology import load_topology
from triptych.bus import BusError, Outbox, RemoteError

if TYPE_CHECKING:
    from triptych.actors.topology import Topology

_LOOK_EVERY_S: Final = 0.5
_ANSWER_S: Final = 30.0


def reload(
    file: TopologyFile,
    name: Annotated[str, typer.Argument(metavar="[MODEL]", help="One model; else all.", show_default=False)] = "",
) -> None:
    """Restart the instances of a running cluster with the model's files as they are on disk now.

    One instance after the other, each when it is idle: what was begun with the earlier weights is finished with them.
    Waits until all are done; Ctrl-C ends the wait, not the restarts. Exits with 1 when the head cannot be reached or
    refuses.

    [bold]Example[/]

    triptych reload examples/demo.toml
    """
    try:
        topology = load_topology(file)
    except TopologyError as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    console = Console(stderr=True, highlight=False)
    try:
        model = asyncio.run(_reload(topology, name, console))
    except RemoteError as error:
        fail(error.detail, EXIT_FAILED)
    except BusError as error:
        fail(f"The head of {file} cannot be reached: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        fail("The instances go on restarting; `triptych status` shows them.", EXIT_INTERRUPTED)
    console.print(f"All instances have the weights that are on disk ({model}).")


async def _reload(topology: Topology, name: str, console: Console) -> str:
    address_book = AddressBook(topology)
    outbox = Outbox("reload", curve=address_book.keys)
    try:
        head = outbox.reference("head", address_book.address("head"))
        with console.status("Asking the head") as shown:
            while True:
                answer = await head.ask(ReloadModel(name), Reloading, timeout_s=_ANSWER_S)
                if not answer.instances:
                    return answer.model
                shown.update(f"Restarting {', '.join(answer.instances)}")
                await asyncio.sleep(_LOOK_EVERY_S)
    finally:
        outbox.close()
