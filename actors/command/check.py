"""`triptych check`: is this topology right, and which processes does it lead to?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from actors.command.output import EXIT_BAD_TOPOLOGY, fail, rows_of, stdout, table
from actors.errors import TopologyError
from actors.preflight import preflight
from actors.topology import Topology, load_topology

TopologyFile = Annotated[Path, typer.Argument(metavar="FILE", help="The topology, a TOML file.", show_default=False)]


def check(file: TopologyFile) -> None:
    """Check a topology file, and list the processes that it leads to.

    Prints one sentence and exits with 2 when the file cannot be run on this machine.

    [bold]Example[/]

    triptych check examples/demo.toml
    """
    try:
        topology = load_topology(file)
        preflight(topology, topology.components, file=str(file))
    except TopologyError as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    show(topology)


def show(topology: Topology) -> None:
    """Print the components of a topology."""
    rows = [
        (component.name, component.kind, escape(component.address), component.device if component.slots else "")
        for component in topology.components
    ]
    console = stdout()
    console.print(rows_of(table("name", "kind", "address", "device"), rows))
    console.print(f"HTTP on {topology.url}, model {escape(str(topology.model_path))}")
