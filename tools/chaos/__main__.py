"""`python -m triptych.tools.chaos`: inject faults into a cluster under load, and check its invariants."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json as jsons
import os
import shutil
import tempfile
import time
from collections.abc import Coroutine
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from triptych.actors.errors import TopologyError
from triptych.actors.topology import load_topology
from triptych.api.client import ClientError
from triptych.api.launch import launch
from triptych.engines.parameters.serving_config import SERVING_CONFIG_NAME
from triptych.roles.pool.client import FAULTS as FAULTS_VARIABLE
from triptych.tools.chaos import invariants
from triptych.tools.chaos.clock import Clock
from triptych.tools.chaos.faults import (
    FAULTS,
    PAUSE_PAST_TIMEOUT_S,
    small_disk,
    transfer_keys,
    transfer_rates,
    why_unsupported,
)
from triptych.tools.chaos.injector import FaultInjector
from triptych.tools.chaos.load import LoadGenerator, Outcome
from triptych.tools.chaos.monitor import (
    MailboxMonitor,
    check_changed_topology,
    check_restart_intensity,
    journal_keys,
    wait_until_idle,
)
from triptych.tools.chaos.plan import (
    CHANGED,
    HOST_POOL_SIZE,
    POOL_SIZE,
    RANGES,
    ImageCase,
    Plan,
    make_plan,
)
from triptych.tools.chaos.report import ChaosReport, show, summary
from triptych.tools.chaos.target import LocalTarget, Target
from triptych.tools.hosts import HostsError, enter_switch
from triptych.tools.hosts.cluster import launch_on_hosts

CLIENT_PATIENCE_S = 90.0
"""Seconds after which a client takes its request for lost; more where victims may take long to be back."""
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
console = Console()


@app.command(
    epilog="Examples: python -m triptych.tools.chaos examples/chaos.toml --seed 7 --duration 60 --rate 4 --faults all"
    " --json report.json  ·  python -m triptych.tools.chaos examples/chaos.toml --faults kill,head"
    "  ·  python -m triptych.tools.chaos --hosts 3 --faults all --bound 60"
)
def main(
    topology: Annotated[
        Path | None,
        typer.Argument(
            help="What to start and inject faults into; by default examples/chaos.toml, with --hosts chaos-hosts.toml.",
            show_default=False,
        ),
    ] = None,
    hosts: Annotated[
        int, typer.Option(help="Run on so many hosts, those of TOPOLOGY, which are namespaces of this machine.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="The same seed plans the same load and the same faults.")] = 7,
    duration: Annotated[float, typer.Option(help="Seconds of load.", min=5, max=3600)] = 60.0,
    rate: Annotated[float, typer.Option(help="Requests a second.", min=0.1, max=50)] = 4.0,
    every: Annotated[float, typer.Option(help="Seconds between two faults, on average.", min=0.2)] = 2.5,
    faults: Annotated[str, typer.Option(help=f"Some of {','.join(FAULTS)}, or all that are possible here.")] = "all",
    bound: Annotated[float, typer.Option(help="Most seconds for a victim to be back.")] = 20.0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the report here as well.")] = None,
) -> None:
    """Start TOPOLOGY, send a seeded load, inject faults, and check that no accepted request was lost."""
    topology = topology or Path("examples/chaos-hosts.toml" if hosts else "examples/chaos.toml")
    chosen = list(FAULTS) if faults == "all" else faults.split(",")
    if unknown := [fault for fault in chosen if fault not in FAULTS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(FAULTS)}", param_hint="--faults")
    try:
        parsed = load_topology(topology)
        if len(parsed.hosts) != hosts:
            raise typer.BadParameter(f"{topology} has {len(parsed.hosts)} [[hosts]]", param_hint="--hosts")
        if hosts:
            enter_switch()
        with tempfile.TemporaryDirectory(prefix="triptych-chaos-") as name, ExitStack() as stack:
            folder = Path(name)
            (folder / "state").mkdir(mode=0o700)
            stack.enter_context(small_disk(folder / "state"))
            problems = why_unsupported(chosen, parsed.engine, folder / "state")
            for fault, problem in problems.items():
                if faults != "all":
                    raise typer.BadParameter(f"{fault!r} is not possible: {problem}", param_hint="--faults")
                console.print(f"without {fault}: {problem}")
            can = [fault for fault in chosen if fault not in problems]
            clock = stack.enter_context(Clock(folder).preloaded()) if "clock" in can else None
            report = asyncio.run(run(topology, folder, clock, seed, duration, rate, every, can, bound))
    except (ClientError, HostsError, TopologyError) as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from error
    show(report, console)
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    raise typer.Exit(0 if report.held else 1)


async def run(
    topology: Path,
    folder: Path,
    clock: Clock | None,
    seed: int,
    duration_s: float,
    rate: float,
    every_s: float,
    faults: list[str],
    bound_s: float,
) -> ChaosReport:
    """Run load with faults; on one machine, if "kill" is among them, check restart intensity and a changed topology.

    The model goes to `folder`, whose "state" is there. The cluster has the clock of the machine where `clock` is None.
    Raises `ClientError` and `TopologyError`.
    """
    parsed = load_topology(topology)
    own: dict[str, dict[str, object]] = {
        "model": {"path": str(_copy_model_with_wide_ranges(topology, folder / "model"))},
        "transfer": {"pool_size": HOST_POOL_SIZE if parsed.hosts else POOL_SIZE, **transfer_keys(faults)},
    }
    victims = {fault: FAULTS[fault].victims(parsed) for fault in faults}
    plan = make_plan(seed, duration_s, rate, every_s, faults, victims)
    asked = sorted({planned.image for planned in plan.requests} | set(CHANGED))
    rates = {FAULTS_VARIABLE: transfer_rates(faults)}
    if parsed.hosts:
        environment = rates | (clock.environment() if clock else {})
        environments = {host.name: environment for host in parsed.hosts}
        disks = folder / "state"
        async with launch_on_hosts(topology, own, shared=[folder], environments=environments, disks=disks) as target:
            baseline = {image: await digest(target, image) for image in asked}
            return await run_load(target, plan, seed, duration_s, bound_s, baseline, clock)
    own |= {"api": {"port": 0}, "state": {"path": str(folder / "state")}}
    async with launch(topology, own) as baseline_cluster:
        baseline = {image: await digest(LocalTarget(baseline_cluster), image) for image in asked}
    os.environ.update(rates)
    try:
        async with launch(topology, own) as cluster:
            report = await run_load(LocalTarget(cluster), plan, seed, duration_s, bound_s, baseline, clock)
    finally:
        del os.environ[FAULTS_VARIABLE]
    if "kill" in faults:
        report.invariants["overflow of intensity is seen in /ready"] = await check_restart_intensity(topology, own)
        report.invariants["a changed topology loses nothing"] = await check_changed_topology(topology, own, baseline)
    return report


def _copy_model_with_wide_ranges(topology: Path, folder: Path) -> Path:
    """Copy the model of a topology, with a serving config whose ranges allow the load."""
    shutil.copytree(load_topology(topology).models[0].path, folder)
    serving_config = folder / SERVING_CONFIG_NAME
    settings = jsons.loads(serving_config.read_text())
    serving_config.write_text(jsons.dumps({**settings, "ranges": {**settings.get("ranges", {}), **RANGES}}))
    return folder


async def digest(cluster: Target, image: ImageCase) -> str:
    """Make an image and return the SHA-256 of its file."""
    made = await cluster.generate(image.prompt, seed=image.seed, steps=image.steps, size=f"{image.side}x{image.side}")
    return hashlib.sha256(made.data).hexdigest()


async def run_load(
    cluster: Target,
    plan: Plan,
    seed: int,
    duration_s: float,
    bound_s: float,
    baseline: dict[ImageCase, str],
    clock: Clock | None,
) -> ChaosReport:
    """Run the load and inject the faults, wait until the cluster is idle, then check the invariants."""
    patience_s = max(CLIENT_PATIENCE_S, 3 * bound_s)
    clients = LoadGenerator(cluster, f"chaos-{seed}-{os.getpid()}", patience_s=patience_s)
    injector, watch = FaultInjector(cluster, seed, clock), MailboxMonitor(cluster)
    began = time.monotonic()
    watching = asyncio.create_task(watch.run())
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(f"{len(plan.requests)} requests, {len(plan.faults)} faults", total=len(plan.requests))

        async def ask(k: int) -> Outcome:
            await _at(began, plan.requests[k].at_s)
            outcome = await clients.ask(plan.requests[k])
            progress.advance(bar)
            return outcome

        async def inject(k: int) -> None:
            await _at(began, plan.faults[k].at_s)
            await injector.inject(plan.faults[k])

        asked = [ask(k) for k in range(len(plan.requests))]
        injections: list[Coroutine[Any, Any, Any]] = [inject(k) for k in range(len(plan.faults))]
        outcomes = (await asyncio.gather(asyncio.gather(*asked), asyncio.gather(*injections)))[0]
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching  # what has ended it before is raised: depths that nobody watched are no proof
    await cluster.wait_ready(bound_s)
    await clients.fetch_final_views(outcomes)
    pools, leases, kept = await wait_until_idle(cluster)
    children = await cluster.children()
    silence_s = cluster.topology.supervision.heartbeat_timeout_s + PAUSE_PAST_TIMEOUT_S
    restarts = {name: child.restarts for name, child in children.items()}
    found = {
        "each accepted request ended once": invariants.each_accepted_request_ended_once(outcomes),
        "each client saw one request": invariants.each_client_saw_one_request(outcomes, journal_keys(cluster)),
        "every block is accounted for": invariants.every_block_is_accounted_for(pools, leases, kept),
        "nothing outdated was accepted": invariants.no_stale_report_was_accepted(outcomes, clock_set=clock is not None),
        "everyone came back in time": invariants.every_victim_recovered(injector.injected, bound_s),
        "only victims restarted, no zombie": invariants.only_victims_restarted(
            restarts, injector.injected, watch.zombies()
        ),
        "same seed, same bytes": invariants.same_seed_same_bytes(outcomes, baseline),
        "no mailbox over its bound": invariants.no_mailbox_overflowed(watch.depths),
        "failed only when at fault": invariants.failed_only_when_at_fault(outcomes),
        "no standstill": invariants.no_request_stalled(outcomes, bound_s + silence_s),
    }
    injector.close()
    await clients.close()
    return summary(seed, duration_s, outcomes, injector.injected, sum(restarts.values()), found)


async def _at(began: float, at_s: float) -> None:
    await asyncio.sleep(max(0.0, began + at_s - time.monotonic()))


if __name__ == "__main__":
    app()
