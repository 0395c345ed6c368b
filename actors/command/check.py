"""`triptych check`: whether a topology and its models can be served, and which processes it leads to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Final, Protocol

import msgspec
import typer
from rich.markup import escape

from triptych.actors.command._console import EXIT_BAD_TOPOLOGY, fail, stderr, stdout, table
from triptych.actors.command.preflight import preflight
from triptych.actors.errors import StartError, TopologyError, UnknownNameError
from triptych.actors.runtime.bus_keys import this_host
from triptych.actors.supervision import load_function, quiet_libraries
from triptych.actors.topology import Component, HostSection, Model, ModelReport, Topology, load_topology

TopologyFile = Annotated[Path, typer.Argument(metavar="FILE", help="The topology, a TOML file.", show_default=False)]
HostName = Annotated[
    str,
    typer.Option(
        "--host", metavar="NAME", help="This machine's [\\[hosts]] entry; default: TRIPTYCH_HOST, else the head's."
    ),
]

CHECK_MODEL: Final = "triptych.roles.worker.model_check:check_model"
"""The `CheckModel`; it imports the large libraries."""


class CheckModel(Protocol):
    """Finds what is wrong with a model."""

    def __call__(
        self, model: Model, components: Sequence[Component], *, dry_run: bool, say: Callable[[str], None]
    ) -> ModelReport:
        """Check a model that these components serve; `say` is told what is being done."""


def check(
    file: TopologyFile,
    model: Annotated[
        bool,
        typer.Option(
            "--model", help="Also check the model: its files, its classes, and one tiny request. Takes seconds."
        ),
    ] = False,
    host: HostName = "",
    no_dry_run: Annotated[
        bool, typer.Option("--no-dry-run", help="With --model: do not load the model for a request.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check a topology file, and list the processes that it leads to, and with several hosts where each runs.

    Exits with 0 when everything can be served. Exits with 2 when the file cannot be run on this machine or a model
    cannot be served, after one sentence for each problem. With several hosts a machine is checked for what runs on it.

    With --model it reads the configuration of all components and the headers of all weights, and compares them with the
    classes of the installed libraries. Then, if the weights fit into free memory, it loads them and makes one request
    of the smallest size and number of steps that the model takes.

    [bold]Examples[/]

    triptych check examples/demo.toml

    triptych check examples/demo.toml --model

    triptych check examples/demo.toml --model --no-dry-run --json | jq '.models[].problems'
    """
    try:
        topology = load_topology(file)
        here = this_host(topology, host)
        preflight(topology, topology.on_host(here) if here else topology.components, file=str(file))
        if not as_json:
            show(topology)
        reports = _look_at_models(topology, dry_run=not no_dry_run) if model else []
    except (TopologyError, UnknownNameError, StartError) as error:
        if as_json:
            _print_json(file, False, str(error), [])
            raise typer.Exit(EXIT_BAD_TOPOLOGY) from error
        fail(str(error), EXIT_BAD_TOPOLOGY)
    ok = all(report.ok for report in reports)
    if as_json:
        _print_json(file, ok, "", reports)
    else:
        for report in reports:
            show_report(report, several=len(reports) > 1)
    raise typer.Exit(0 if ok else EXIT_BAD_TOPOLOGY)


def _look_at_models(topology: Topology, *, dry_run: bool) -> list[ModelReport]:
    """Check all models; raises `StartError` if what checks them cannot be loaded."""
    quiet_libraries()
    check_model: CheckModel = load_function(CHECK_MODEL)
    with stderr().status("") as status:

        def say(what: str) -> None:
            status.update(escape(what))

        return [check_model(model, _served_by(topology, model), dry_run=dry_run, say=say) for model in topology.models]


def _served_by(topology: Topology, model: Model) -> list[Component]:
    return [component for component in topology.components if component.slots and component.model == model.name]


def show_report(report: ModelReport, *, several: bool = False) -> None:
    """Print the report of a model: problems to stderr, the rest to stdout."""
    of = f"{report.name}: " if several else ""
    errors = stderr()
    for problem in report.problems:
        errors.print(f"{of}{problem.problem}", style="red" if problem.fatal else "yellow", markup=False)
    for sentence in (report.sentence, report.dry_run):
        if sentence:
            stdout().print(escape(f"{of}{sentence}"), soft_wrap=True)


def _print_json(file: Path, ok: bool, problem: str, reports: list[ModelReport]) -> None:
    found = {"file": str(file), "ok": ok, "problem": problem, "models": [msgspec.to_builtins(each) for each in reports]}
    print(json.dumps(found, indent=2))


def show(topology: Topology) -> None:
    """Print the components of a topology, and where each runs if there are several hosts."""
    console = stdout()
    if topology.hosts:
        rows = [_host_row(topology, host) for host in topology.hosts]
        console.print(table(("host", "address", "components", "pool", "transfer ports", "supervisor"), rows))
        console.print()
    components = [
        (
            component.name,
            *((component.host,) if topology.hosts else ()),
            component.kind,
            escape(component.address),
            component.device if component.slots else "",
        )
        for component in topology.components
    ]
    columns = ("name", *(("host",) if topology.hosts else ()), "kind", "address", "device")
    console.print(table(columns, components))
    paths = ", ".join(str(model.path) for model in topology.models)
    on = f" of host {topology.head_host}" if len(topology.hosts) > 1 else ""
    console.print(f"HTTP on {topology.url}{on}, model {escape(paths)}")
    if pools := [component for component in topology.components if component.kind == "pool"]:
        sizes = dict.fromkeys(topology.pool_size(pool) for pool in pools)
        console.print(
            f"A pool of {' or '.join(sizes)} takes up to {topology.largest_payload:,} bytes from one stage for the next"
        )
    if topology.backend.is_open_to_network:
        of = "its host" if topology.hosts else "this host"
        console.print(
            f"The pools' memory is open for reading and writing to whoever reaches {topology.engine}'s ports on {of}, "
            "which it opens on every interface: see docs/security.md"
        )


def _host_row(topology: Topology, host: HostSection) -> tuple[str, ...]:
    here = topology.on_host(host.name)
    pool = next((component for component in here if component.kind == "pool"), None)
    first, last = topology.transfer_ports(host.name)
    several = len(topology.hosts) > 1
    return (
        host.name,
        escape(host.address),
        ", ".join(component.name for component in here if component.kind != "pool"),
        f"{pool.name}, {topology.pool_size(pool)}" if pool else "",
        f"{first}-{last}" if pool and topology.backend.is_open_to_network else "",
        escape(topology.supervisor_address(host)) if several else "",
    )
