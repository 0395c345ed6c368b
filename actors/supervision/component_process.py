"""`python -m triptych.actors.supervision.component_process`: what the process of one component runs.

The supervisor starts it as `--topology FILE --name NAME --build MODULE:FUNCTION --generation G --restarts N
--supervisor NAME --parent PID`. Exit codes: 0 drained, 70 crashed, 75 cannot start now, 78 can never work as
configured.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import structlog
import uvloop
from setproctitle import setproctitle

from triptych.actors.child_state import ChildState
from triptych.actors.errors import ActorCrashedError, StartDelayedError, StartError, TopologyError, describe
from triptych.actors.runtime import diagnostics, logs
from triptych.actors.runtime.actor import Incarnation
from triptych.actors.runtime.address_book import AddressBook
from triptych.actors.runtime.heartbeat import report_final_state
from triptych.actors.runtime.runtime import Runtime
from triptych.actors.runtime.system_messages import ChildStateChanged
from triptych.actors.supervision._child_process import EXIT_CRASH, EXIT_START_DELAYED, EXIT_START_FAILURE
from triptych.actors.supervision._component_specs import COMPONENT_SPECS, Builder, load_function
from triptych.actors.supervision._process_tree import die_with_parent
from triptych.actors.topology import Component, Topology, load_topology
from triptych.bus import Outbox

if TYPE_CHECKING:
    from collections.abc import Sequence

    from triptych.actors.runtime.actor import Actor

_log = structlog.stdlib.get_logger("actors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one component until it ends, and return the exit code."""
    options = _parse(arguments)
    if options.parent:
        die_with_parent()
        if os.getppid() != options.parent:
            return EXIT_CRASH  # the supervisor ended before the death signal was set
    os.umask(0o077)  # only this user may read prompts and results
    setproctitle(f"triptych: {options.name}")
    logs.configure(options.name, options.generation)
    faulthandler.enable()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # before its handler is set, it would kill the process
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run_component(options))


def exit_now(code: int) -> NoReturn:
    """End the process without joining threads, which may hang in a device driver or a transfer."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _run_component(options: argparse.Namespace) -> int:
    try:
        topology = load_topology(options.topology)
        component = topology.component(options.name)
        logs.keep(topology.log_dir, options.name, options.generation, topology.log_bytes)
    except (TopologyError, KeyError) as error:
        _log.error("cannot start", reason=str(error))
        return EXIT_START_FAILURE
    address_book = AddressBook(topology, host=component.host)
    try:
        await _run(options, topology, component, address_book)
    except StartDelayedError as delay:
        _log.warning("cannot start yet", reason=str(delay))
        await _tell_supervisor(options, address_book, ChildState.FAILED, str(delay))
        return EXIT_START_DELAYED
    except StartError as failure:
        _log.error("cannot start", reason=str(failure))
        await _tell_supervisor(options, address_book, ChildState.FAILED, str(failure))
        return EXIT_START_FAILURE
    except Exception as error:  # noqa: BLE001  the process ends with it, and the supervisor learns why
        cause = error.__cause__ if isinstance(error, ActorCrashedError) and error.__cause__ else error
        _log.exception("crashed", exc_info=cause)
        await _tell_supervisor(options, address_book, ChildState.CRASHED, describe(cause))
        return EXIT_CRASH
    return 0


async def _run(
    options: argparse.Namespace, topology: Topology, component: Component, address_book: AddressBook
) -> None:
    build: Builder = load_function(options.build or COMPONENT_SPECS[component.kind].build)
    actors = build(component, topology)
    _check_names(component, actors)
    runtime = Runtime(
        actors,
        Incarnation(address_book, options.generation, options.restarts, component.kind),
        supervisor=options.supervisor,
        shutdown_s=topology.supervision.shutdown_s,
        heartbeat_s=topology.supervision.heartbeat_s,
        import_s=_process_age_s(),
    )
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, runtime.stop, "SIGTERM")
    loop.add_signal_handler(signal.SIGUSR1, diagnostics.dump_tasks, runtime)
    await runtime.run()


def _process_age_s() -> float:
    """Return the seconds since this process was created, in steps of 10 ms."""
    ticks = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]  # field 22, after the name
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK")


def _check_names(component: Component, actors: list[Actor]) -> None:
    first, *others = [actor.name for actor in actors]
    if first != component.name or not all(name.startswith(f"{first}.") for name in others):
        raise ValueError(
            f"{component.name} is built of {[first, *others]}: its own actor comes first, the others are called NAME.x"
        )


async def _tell_supervisor(
    options: argparse.Namespace, address_book: AddressBook, state: ChildState, detail: str
) -> None:
    if not options.supervisor:
        return
    sender = Outbox(options.name, options.generation)
    message = ChildStateChanged(state, detail)
    await report_final_state(sender, options.supervisor, address_book.address(options.supervisor), message)
    sender.close()


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m triptych.actors.supervision.component_process", description=__doc__
    )
    parser.add_argument("--topology", required=True, help="the TOML file")
    parser.add_argument("--name", required=True, help="the component to run")
    parser.add_argument("--build", default="", help='its builder, "module:function"; default by its kind')
    parser.add_argument("--generation", type=int, default=0, help="of this incarnation")
    parser.add_argument("--restarts", type=int, default=0, help="times that it has been restarted")
    parser.add_argument("--supervisor", default="", help="name of the supervisor to report to")
    parser.add_argument("--parent", type=int, default=0, help="pid to end with; 0 = live on your own")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    exit_now(main())
