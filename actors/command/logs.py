"""`triptych logs`: the last lines that the processes of a system have logged."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import typer

from triptych.actors.command._console import EXIT_BAD_TOPOLOGY, EXIT_FAILED, fail, stderr, stdout
from triptych.actors.command._running import actor_names, topology_of
from triptych.actors.command.check import HostName
from triptych.actors.errors import StartError, TopologyError, UnknownNameError
from triptych.actors.runtime.address_book import SUPERVISOR, AddressBook, supervisor_of
from triptych.actors.runtime.bus_keys import this_host
from triptych.actors.runtime.log_files import log_path, logged_names, read_part
from triptych.actors.runtime.logs import printable, terminal_renderer
from triptych.actors.runtime.system_messages import LogPart, LogQuery
from triptych.actors.topology import Topology
from triptych.bus import BusError, Outbox

Level = Literal["debug", "info", "warning", "error"]

_FOLLOW_EVERY_S: Final = 0.5
_ANSWER_TIMEOUT_S: Final = 2.0
_LEVELS: Final = logging.getLevelNamesMapping()


def logs(
    actor: Annotated[
        str,
        typer.Argument(
            metavar="[ACTOR]",
            help="A component (denoiser-0), one of its actors (denoiser-0.stream), a role (denoiser) or a supervisor;"
            " default: all.",
            show_default=False,
            autocompletion=actor_names,
        ),
    ] = "",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines until Ctrl-C.")] = False,
    level: Annotated[Level, typer.Option(help="The least level.")] = "debug",
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last lines.")] = 100,
    topology: Annotated[
        Path | None,
        typer.Option(
            "--topology",
            metavar="FILE",
            help="The topology; default: that of the system that runs on this machine.",
            show_default=False,
        ),
    ] = None,
    host: HostName = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines as they were logged, as JSON.")] = False,
) -> None:
    """Show the last lines that the processes of a system have logged, also those of processes that have died.

    Each process keeps its last lines in the state folder of its host ([state] log_size). With several hosts their
    supervisors are asked for them; of one that does not answer, there are the files that this machine has.

    [bold]Examples[/]

    triptych logs

    triptych logs denoiser-0 -f

    triptych logs --level warning --topology examples/demo.toml

    triptych logs api -n 1000 --json | jq 'select(.request_id == "...")'
    """
    try:
        found = topology_of(topology)
        asyncio.run(_show(found, this_host(found, host), actor, follow=follow, level=level, last=lines, raw=as_json))
    except (TopologyError, UnknownNameError) as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    except StartError as error:
        fail(str(error), EXIT_FAILED)
    except OSError as error:
        if error.filename is None:  # of what it prints to
            raise
        fail(f"{error.filename} cannot be read: {error.strerror}.", EXIT_FAILED)
    except KeyboardInterrupt:
        return  # this is how --follow ends


class LogLine(NamedTuple):
    """A line of a log."""

    text: str
    """As it was written."""
    fields: Mapping[str, Any]
    """What is in it; empty where a crash has cut it."""

    @property
    def at(self) -> str:
        """Its time, in UTC and as ISO 8601."""
        return str(self.fields.get("timestamp", ""))


def parse_lines(text: str) -> list[LogLine]:
    """Read the lines of a part of a log. Pure."""
    return [LogLine(line, _fields(line)) for line in text.splitlines() if line.strip()]


def _fields(line: str) -> Mapping[str, Any]:
    try:
        fields = json.loads(line)
    except ValueError:  # cut by a crash
        return {}
    return fields if isinstance(fields, dict) else {}


def is_wanted(line: LogLine, actor: str, level: Level) -> bool:
    """Return whether a line is of an actor, or of its supervisor and about it, and of a level. Pure."""
    fields = line.fields
    if _LEVELS.get(str(fields.get("level", "")).upper(), logging.CRITICAL) < _LEVELS[level.upper()]:
        return False
    process = str(fields.get("process", ""))
    child = str(fields.get("child", ""))
    of = (process, _role_of(process), fields.get("actor"), child, _role_of(child))
    return not actor or not fields or actor in of


def sources(topology: Topology, actor: str) -> dict[str, str]:
    """Return the names of the logs that may have lines of an actor, each with its host; "" without hosts.

    Raises `UnknownNameError` if the topology has no such actor.
    """
    several = [host.name for host in topology.hosts] if len(topology.hosts) > 1 else []
    supervisors = {supervisor_of(host): host for host in several} or {SUPERVISOR: ""}
    # Those of components that were started with `up --only`.
    supervisors |= {
        name: "" for name in logged_names(topology.log_dir) if name.startswith(f"{SUPERVISOR}-")
    } | supervisors
    components = {component.name: component.host if several else "" for component in topology.components}
    component = actor.partition(".")[0]
    if component in supervisors:
        return {component: supervisors[component]}
    chosen = {name: host for name, host in components.items() if not actor or component in (name, _role_of(name))}
    if not chosen:
        raise UnknownNameError(f"no actor is called {actor!r}; there are {', '.join([*components, *supervisors])}")
    return chosen | supervisors


def _role_of(component: str) -> str:
    """Return the name of the role of an instance, "denoiser" of "denoiser-0"."""
    return component.rpartition("-")[0]


class _Reader:
    """Reads on in some logs, on this machine or through the supervisors of the others."""

    def __init__(self, topology: Topology, host: str, names: Mapping[str, str]) -> None:
        self._topology = topology
        self._address_book = AddressBook(topology, host=host)
        self._names = names
        self._outbox = Outbox("logs", options=self._address_book.socket_options) if any(names.values()) else None
        self._positions = dict.fromkeys(names, "")
        self.silent: set[str] = set()
        """Hosts whose supervisor did not answer."""

    async def read(self) -> list[LogLine]:
        """Return the lines that are new, by time."""
        parts = await asyncio.gather(*(self._part(name, host) for name, host in self._names.items()))
        lines = [line for part in parts for line in parse_lines(part.lines)]
        return sorted(lines, key=lambda line: line.at)

    def close(self) -> None:
        """Close the sockets."""
        if self._outbox is not None:
            self._outbox.close()

    async def _part(self, name: str, host: str) -> LogPart:
        part = None
        if host and self._outbox is not None:
            supervisor = self._outbox.reference(supervisor_of(host), self._address_book.address(supervisor_of(host)))
            query = LogQuery(name, self._positions[name])
            try:
                part = await supervisor.ask(query, LogPart, timeout_s=_ANSWER_TIMEOUT_S)
            except BusError:
                self.silent.add(host)
        part = part or read_part(log_path(self._topology.log_dir, name), self._positions[name])
        self._positions[name] = part.position
        return part


async def _show(topology: Topology, host: str, actor: str, *, follow: bool, level: Level, last: int, raw: bool) -> None:
    reader = _Reader(topology, host, sources(topology, actor))
    try:
        lines = [line for line in await reader.read() if is_wanted(line, actor, level)]
        for silent in sorted(reader.silent):
            stderr().print(f"host {silent} does not answer: its lines may be missing", style="yellow", markup=False)
        _print(lines[len(lines) - min(last, len(lines)) :], raw=raw)
        while follow:
            await asyncio.sleep(_FOLLOW_EVERY_S)
            _print((line for line in await reader.read() if is_wanted(line, actor, level)), raw=raw)
    finally:
        reader.close()


def _print(lines: Iterable[LogLine] | Sequence[LogLine], *, raw: bool) -> None:
    render = terminal_renderer(colors=stdout().color_system is not None)
    for line in lines:
        text = render(None, "", dict(line.fields)) if line.fields else printable(line.text)
        print(line.text if raw else text, flush=True)
