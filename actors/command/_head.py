"""Ask the head of a running system over the bus, for the commands that change its models."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from triptych.actors.command._console import EXIT_BAD_TOPOLOGY, EXIT_FAILED, EXIT_INTERRUPTED, fail, stderr
from triptych.actors.errors import TopologyError
from triptych.actors.runtime.address_book import AddressBook
from triptych.actors.topology import Topology, load_topology
from triptych.bus import BusError, Outbox, Reference, RemoteError

if TYPE_CHECKING:
    from rich.status import Status

R = TypeVar("R")
Talk = Callable[[Reference, "Status"], Awaitable[R]]
"""Asks the head, and shows on the status line what it waits for."""


def ask_head(file: Path, sender: str, talk: Talk[R], *, interrupted: str) -> R:
    """Return the result of `talk` with the head of the system of a topology file.

    Ends the command with one sentence when the file is wrong, when the head cannot be reached or refuses, and, with
    the sentence `interrupted`, at Ctrl-C.
    """
    try:
        return asyncio.run(_connect(load_topology(file), sender, talk))
    except TopologyError as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    except RemoteError as error:
        fail(error.detail, EXIT_FAILED)
    except BusError as error:
        fail(f"The head of {file} cannot be reached: {error}", EXIT_FAILED)
    except KeyboardInterrupt:
        fail(interrupted, EXIT_INTERRUPTED)


async def _connect(topology: Topology, sender: str, talk: Talk[R]) -> R:
    address_book = AddressBook(topology)
    outbox = Outbox(sender, options=address_book.socket_options)
    try:
        with stderr().status("Asking the head") as status:
            return await talk(outbox.reference("head", address_book.address("head")), status)
    finally:
        outbox.close()
