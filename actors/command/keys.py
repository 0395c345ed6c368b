"""`triptych keys`: make the secret key of a host, and print the public half for the topology."""

from __future__ import annotations

from typing import Annotated

import typer

from triptych.actors.command._console import EXIT_BAD_TOPOLOGY, EXIT_FAILED, fail, stderr
from triptych.actors.command.check import HostName, TopologyFile
from triptych.actors.errors import StartError, TopologyError, UnknownNameError
from triptych.actors.runtime.bus_keys import bus_keys_path, read_key, this_host, write_new_key
from triptych.actors.topology import load_topology


def keys(
    file: TopologyFile,
    host: HostName = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the key that is there.")] = False,
) -> None:
    """Make the secret key of a host, and print the line with its public half for the topology.

    A key that is there already stays, and its line is printed again. Run it on each host, and give all hosts the same
    topology with all the lines. Exits with 1 when the key cannot be written, or is open to other users.

    [bold]Examples[/]

    triptych keys examples/three-hosts.toml --host b

    triptych keys examples/three-hosts.toml --host b --force
    """
    try:
        topology = load_topology(file)
        name = this_host(topology, host)
    except (TopologyError, UnknownNameError) as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    if host and not topology.hosts:
        fail(f"{file} has no [[hosts]]: run it without --host.", EXIT_BAD_TOPOLOGY)
    path = bus_keys_path(topology, name)
    try:
        made = force or not path.exists()
        if made:
            write_new_key(path, replace=force)
        key = read_key(path)
    except StartError as error:
        fail(f"{error}.", EXIT_FAILED)
    whose = f"host {name}" if name else "this host"
    done = "is the new" if made else "was there already, and is the"
    line = f'public_key = "{key.public.decode()}"'
    stderr().print(f"{path} {done} secret key of {whose}. The line for its [[hosts]]:", markup=False, soft_wrap=True)
    print(line)
