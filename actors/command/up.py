"""`triptych up`: start a system and keep it up."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from triptych.actors.command._console import EXIT_BAD_TOPOLOGY, EXIT_FAILED, fail, stdout
from triptych.actors.command._display import Display, make_display
from triptych.actors.command.check import TopologyFile
from triptych.actors.command.preflight import preflight
from triptych.actors.errors import AlreadyRunningError, ForeignStateError, StartError, TopologyError, UnknownNameError
from triptych.actors.placement.ray import run_on_ray
from triptych.actors.placement.service_manager import StatusReporter
from triptych.actors.placement.ssh import SshLauncher
from triptych.actors.runtime import logs
from triptych.actors.runtime.address_book import SUPERVISOR
from triptych.actors.runtime.system_messages import ChildReport
from triptych.actors.supervision import SupervisorProcess, die_with_parent
from triptych.actors.topology import Topology, bind_host, is_ip, load_topology


def up(
    file: TopologyFile,
    only: Annotated[
        str,
        typer.Option(
            "--only",
            metavar="NAME,...",
            help="Run only these components, each under its own supervisor. They may be started in any order.",
            show_default=False,
        ),
    ] = "",
    host: Annotated[
        str,
        typer.Option(
            "--host",
            metavar="NAME",
            help="Run the components of this one of the [\\[hosts]]. The hosts may be started in any order.",
            show_default=False,
        ),
    ] = "",
    until_eof: Annotated[
        bool, typer.Option("--until-eof", help="Also stop at the end of stdin, such as of an ssh session.")
    ] = False,
    ray: Annotated[
        str,
        typer.Option(
            "--ray",
            metavar="ADDRESS",
            help="Let a Ray cluster (HOST:PORT of its head, or auto) choose a node for each of the [\\[hosts]].",
            show_default=False,
        ),
    ] = "",
    ssh: Annotated[
        bool, typer.Option("--ssh", help="Run the supervisors of all [\\[hosts]] over ssh, and start them again.")
    ] = False,
    ssh_config: Annotated[
        str, typer.Option(metavar="FILE", help="With --ssh: the configuration of ssh, as its -F.", show_default=False)
    ] = "",
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"] | None,
        typer.Option(help="Default: warning on a terminal, else info; or TRIPTYCH_LOG_LEVEL.", show_default=False),
    ] = None,
    parent: Annotated[int, typer.Option(hidden=True, help="Stop when the process of this id ends.")] = 0,
    reason_file: Annotated[Path | None, typer.Option(hidden=True, help="Write why it could not run here.")] = None,
) -> None:
    """Start every process of a topology, and keep them up until Ctrl-C.

    Ctrl-C drains and stops everything in order, and exits with 0; a second Ctrl-C kills. Exits with 2 and one sentence
    when the topology cannot be run, or when the head, the API, a pool or all instances of a role cannot start. Exits
    with 1 when nothing is left to run for another reason.

    [bold]Examples[/]

    triptych up examples/demo.toml

    triptych up examples/demo.toml --only denoiser-0

    triptych up examples/demo.toml --only head,api --log-level debug

    triptych up examples/three-hosts.toml --host b

    triptych up examples/three-hosts.toml --ssh

    triptych up examples/three-hosts.toml --ray 10.0.0.1:6379
    """
    if parent:
        die_with_parent(signal.SIGTERM)
        if os.getppid() != parent:
            raise typer.Exit(EXIT_FAILED)
    console = stdout()
    _configure_logs(log_level or "", on_terminal=console.is_terminal)
    if ray:
        _place(lambda: run_on_ray(file, ray, _say, log_level or ""), only or host or ssh, reason_file)
    try:
        topology = load_topology(file)
        if ssh:
            _check_ssh(topology, host or only, file=str(file))
            raise typer.Exit(_run_over_ssh(topology, console, ssh_config))
        _check_host(topology, host, only=only, file=str(file))
        display = make_display(console, topology)
        reporter = StatusReporter()
        supervision = SupervisorProcess(
            topology,
            only=_names(only),
            host=host,
            until_eof=until_eof,
            on_change=lambda report: _tell(report, display, reporter),
            side_task=lambda: _report(display, reporter),
        )
        reporter.watch(component.name for component in supervision.components)
        _check_address(topology, host or supervision.components[0].host)
        preflight(topology, supervision.components, file=str(file))
    except (TopologyError, UnknownNameError) as error:
        _fail(str(error), EXIT_BAD_TOPOLOGY, reason_file)
    except StartError as error:
        _fail(str(error), EXIT_FAILED, reason_file)
    try:
        with display.showing(supervision.components):
            code = supervision.run()
    except (AlreadyRunningError, ForeignStateError, PermissionError, StartError) as error:
        _fail(str(error), EXIT_FAILED, reason_file)
    if supervision.problem:
        _fail(supervision.problem, code, reason_file)
    raise typer.Exit(code)


def _tell(report: ChildReport, display: Display, reporter: StatusReporter) -> None:
    display.changed(report)
    reporter.changed(report)


async def _report(display: Display, reporter: StatusReporter) -> None:
    await asyncio.gather(display.announce_readiness(), reporter.run())


def _check_ssh(topology: Topology, chosen: str, *, file: str) -> None:
    """Raise `TopologyError` if there is nothing to reach over ssh, or only a part of it is asked for."""
    if chosen:
        problem, fix = f"is run on all hosts with --ssh, and here only as {chosen}", "leave out --host and --only"
        raise TopologyError(file, "", problem, fix)
    if not topology.hosts:
        raise TopologyError(file, "", "has no [[hosts]]", "run it without --ssh, or add a [[hosts]] for each machine")


def _run_over_ssh(topology: Topology, console: Console, config: str) -> int:
    """Run the supervisors of all hosts until SIGINT, SIGTERM or SIGHUP; a second signal kills the ssh's."""
    width = max(len(host.name) for host in topology.hosts)

    def show(host: str, line: str) -> None:
        console.print(Text.assemble((f"{host:<{width}} ", "bold"), line), soft_wrap=True)

    async def run() -> int:
        launcher = SshLauncher(topology, show, config=config, log_level=os.environ[logs.SHOWN_VARIABLE])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, launcher.stop)
        return await launcher.run()

    return asyncio.run(run())


def _place(run: Callable[[], int], contradiction: object, reason_file: Path | None) -> NoReturn:
    """Let an engine place the hosts, and exit as it ends."""
    if contradiction:
        fail(
            "an engine that places the hosts places all of them: leave out --host, --only and --ssh", EXIT_BAD_TOPOLOGY
        )
    try:
        raise typer.Exit(run())
    except TopologyError as error:
        _fail(str(error), EXIT_BAD_TOPOLOGY, reason_file)
    except (AlreadyRunningError, PermissionError, StartError) as error:
        _fail(str(error), EXIT_FAILED, reason_file)


def _say(host: str, line: str) -> None:
    """Show a line of a host, or of what places the hosts."""
    stdout().print(f"{host or 'triptych'} | {line}", markup=False, soft_wrap=True)


def _check_host(topology: Topology, host: str, *, only: str, file: str) -> None:
    """Raise `TopologyError` if the hosts of the topology and the options of the command do not fit together."""
    names = ", ".join(each.name for each in topology.hosts)
    if host and only:
        problem = f"cannot be run with both --host {host} and --only {only}"
        raise TopologyError(
            file, "", problem, "components are on the host that the file gives them, so leave out --host"
        )
    if host and not topology.hosts:
        raise TopologyError(file, "", "has no [[hosts]]", "run it without --host, or add a [[hosts]] for each machine")
    if len(topology.hosts) > 1 and not host and not only:
        fix = f"run `triptych up {file} --host NAME` on each, or have them started with --ssh or --ray ADDRESS"
        raise TopologyError(file, "", f"has {len(topology.hosts)} hosts ({names})", fix)

    spread = sorted({topology.component(name).host for name in _names(only)})
    if len(spread) > 1:
        problem = f"cannot be run here with --only {only}, which are on the hosts {' and '.join(spread)}"
        raise TopologyError(file, "", problem, "name components of one host")


def _check_address(topology: Topology, name: str) -> None:
    """Raise `StartError` if the mailboxes of one of several hosts cannot listen on this machine, at least not yet."""
    if len(topology.hosts) < 2:
        return
    host = topology.host(name)
    address = bind_host(host)
    if not is_ip(address):  # "*", or an interface
        return
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError as error:
            key, fix = ("bind", "correct it") if host.bind else ("address", 'write bind = "*" if others reach it there')
            raise StartError(
                f'[[hosts]] "{name}" {key} = "{address}" cannot be listened on by this machine ({error.strerror}): '
                f"run it on host {name}, or {fix}."
            ) from error


def _fail(sentence: str, code: int, reason_file: Path | None) -> NoReturn:
    if reason_file is not None:
        reason_file.write_text(sentence)
    fail(sentence, code)


def _names(only: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in only.split(",") if name.strip()))


def _configure_logs(level: str, *, on_terminal: bool) -> None:
    """Show warnings alone on a terminal, and keep more in the files, unless a level was chosen."""
    chosen = level or os.environ.get(logs.LEVEL_VARIABLE, "")
    os.environ[logs.LEVEL_VARIABLE] = chosen or "info"  # for the children, too
    os.environ[logs.SHOWN_VARIABLE] = chosen or ("warning" if on_terminal else "info")
    logs.configure(SUPERVISOR)
