"""`triptych check`: is this topology right, and which processes does it lead to?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from actors.command.output import EXIT_BAD_TOPOLOGY, fail, rows_of, stdout, table
from actors.components import load_describe
from actors.errors import StartFailure, TopologyError
from actors.launcher import QUIET
from actors.preflight import preflight
from actors.topology import Topology, load_topology

TopologyFile = Annotated[Path, typer.Argument(metavar="FILE", help="The topology, a TOML file.", show_default=False)]


def check(
    file: TopologyFile,
    model: Annotated[bool, typer.Option("--model", help="Also look at the model, which takes some seconds.")] = False,
) -> None:
    """Check a topology file, and list the processes that it leads to.

    Prints one sentence and exits with 2 when the file cannot be run on this machine.

    [bold]Example[/]

    triptych check examples/demo.toml

    triptych check examples/demo.toml --model
    """
    try:
        topology = load_topology(file)
        preflight(topology, topology.components, file=str(file))
    except TopologyError as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    show(topology)
    if model:
        show_model(topology)


def show_model(topology: Topology) -> None:
    """Print how each model of a topology would be served; exits with 2 when one cannot be."""
    try:
        os.environ.update({name: level for name, level in QUIET.items() if name not in os.environ})
        told = [(model.name, *load_describe()(model)) for model in topology.models]
    except StartFailure as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    for name, sentence, problem in told:
        of = f"{name}: " if len(told) > 1 else ""
        if problem:
            fail(f"{of}{problem}", EXIT_BAD_TOPOLOGY)
        stdout().print(escape(f"{of}{sentence}"))


def show(topology: Topology) -> None:
    """Print the components of a topology."""
    rows = [
        (component.name, component.kind, escape(component.address), component.device if component.slots else "")
        for component in topology.components
    ]
    console = stdout()
    console.print(rows_of(table("name", "kind", "address", "device"), rows))
    paths = ", ".join(str(model.path) for model in topology.models)
    console.print(f"HTTP on {topology.url}, model {escape(paths)}")
    if any(component.kind == "pool" for component in topology.components):
        size, largest = topology.transfer.pool_size, topology.transfer.largest_payload
        console.print(f"A pool of {size} takes up to {largest:,} bytes from one stage for the next")
    if topology.engine == "mooncake":
        console.print(
            "The pools' memory is open for reading and writing to whoever reaches mooncake's ports on this host, "
            "which it opens on every interface: see docs/security.md"
        )
