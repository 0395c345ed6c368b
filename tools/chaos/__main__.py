"""`python -m triptych.tools.chaos`: strike a cluster under load, and say whether it kept its promises."""

from __future__ import annotations

import asyncio
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

from triptych.actors import launch
from triptych.actors.client import ApiError
from triptych.actors.cluster import Cluster
from triptych.actors.errors import TopologyError
from triptych.actors.topology import load_topology
from triptych.engines.card import CARD_NAME
from triptych.roles.pool_client import FAULTS as DAMAGE
from triptych.tools.chaos import checks
from triptych.tools.chaos.clock import Clock
from triptych.tools.chaos.faults import FAULTS, PAUSE_PAST_TIMEOUT_S, small_disk
from triptych.tools.chaos.load import Clients, Outcome
from triptych.tools.chaos.observe import Watch, at_rest, changed_topology, escalation, journal_keys
from triptych.tools.chaos.plan import CHANGED, POOL_SIZE, PULL_TIMEOUT_S, RANGES, TRANSFERS, Picture, Plan, damage, draw
from triptych.tools.chaos.report import Report, show, summary
from triptych.tools.chaos.strikes import Striker

NAMES = (*FAULTS, *TRANSFERS)
SETTLE_S = 90.0
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
console = Console()


@app.command(
    epilog="Examples: python -m triptych.tools.chaos examples/chaos.toml --seed 7 --duration 60 --rate 4 --faults all"
    " --json report.json  ·  python -m triptych.tools.chaos examples/chaos.toml --faults kill,head"
)
def main(
    topology: Annotated[Path, typer.Argument(help="What to start and strike.")] = Path("examples/chaos.toml"),
    seed: Annotated[int, typer.Option(help="The same seed plans the same load and the same strikes.")] = 7,
    duration: Annotated[float, typer.Option(help="Seconds of load.", min=5, max=3600)] = 60.0,
    rate: Annotated[float, typer.Option(help="Requests a second.", min=0.1, max=50)] = 4.0,
    every: Annotated[float, typer.Option(help="Seconds between two strikes, on average.", min=0.2)] = 2.5,
    faults: Annotated[str, typer.Option(help=f"Some of {','.join(NAMES)}, or all that are possible here.")] = "all",
    bound: Annotated[float, typer.Option(help="Most seconds for a victim to be back.")] = 20.0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the report here as well.")] = None,
) -> None:
    """Start TOPOLOGY, offer a seeded load, strike its actors, and check that nothing accepted was lost."""
    chosen = list(NAMES) if faults == "all" else faults.split(",")
    if unknown := [fault for fault in chosen if fault not in NAMES]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(NAMES)}", param_hint="--faults")
    try:
        with tempfile.TemporaryDirectory(prefix="triptych-chaos-") as name, ExitStack() as stack:
            folder = Path(name)
            (folder / "state").mkdir(mode=0o700)
            stack.enter_context(small_disk(folder / "state"))
            problems = impossible(chosen, load_topology(topology).engine, folder / "state")
            for fault, problem in problems.items():
                if faults != "all":
                    raise typer.BadParameter(f"{fault!r} is not possible: {problem}", param_hint="--faults")
                console.print(f"without {fault}: {problem}")
            can = [fault for fault in chosen if fault not in problems]
            clock = stack.enter_context(Clock(folder).preloaded()) if "clock" in can else None
            report = asyncio.run(run(topology, folder, clock, seed, duration, rate, every, can, bound))
    except (ApiError, TopologyError) as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from error
    show(report, console)
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    raise typer.Exit(0 if report.held else 1)


def impossible(faults: list[str], engine: str, state: Path) -> dict[str, str]:
    """Why faults cannot be caused here, by name."""
    problems = {fault: FAULTS[fault].impossible(state) for fault in faults if fault in FAULTS}
    if "late" in faults and engine != "mooncake":
        problems["late"] = f"nothing is late where memory is shared, and the topology has engine {engine}"
    return {fault: problem for fault, problem in problems.items() if problem}


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
) -> Report:
    """Run the storm, then the drills for too many restarts and for another topology.

    The model goes to `folder`, whose "state" is there. The cluster has the clock of the machine where `clock` is None.
    Raises `ApiError` and `TopologyError`.
    """
    own: dict[str, dict[str, object]] = {
        "api": {"port": 0},
        "state": {"path": str(folder / "state")},
        "model": {"path": str(_roomy_model(topology, folder / "model"))},
        "transfer": {"pool_size": POOL_SIZE, **({"pull_timeout_s": PULL_TIMEOUT_S} if "late" in faults else {})},
    }
    parsed = load_topology(topology)
    victims = {fault: FAULTS[fault].victims(parsed) for fault in faults if fault in FAULTS}
    plan = draw(seed, duration_s, rate, every_s, faults, victims)
    asked = {offer.picture for offer in plan.offers} | set(CHANGED)
    async with launch(topology, own) as calm:
        undisturbed = {picture: await digest(calm, picture) for picture in sorted(asked)}
    os.environ[DAMAGE] = damage(faults)
    try:
        async with launch(topology, own) as cluster:
            report = await storm(cluster, plan, seed, duration_s, bound_s, undisturbed, clock)
    finally:
        del os.environ[DAMAGE]
    if "kill" in faults:
        report.invariants["overflow of intensity is seen in /ready"].extend(await escalation(topology, own))
        report.invariants["a changed topology loses nothing"].extend(await changed_topology(topology, own, undisturbed))
    return report


def _roomy_model(topology: Path, folder: Path) -> Path:
    """Copy the model of a topology, with a card that allows what the load asks for."""
    shutil.copytree(load_topology(topology).models[0].path, folder)
    card = folder / CARD_NAME
    settings = jsons.loads(card.read_text())
    card.write_text(jsons.dumps({**settings, "ranges": {**settings.get("ranges", {}), **RANGES}}))
    return folder


async def digest(cluster: Cluster, picture: Picture) -> str:
    """SHA-256 of one picture's file."""
    made = await cluster.generate(
        picture.prompt, seed=picture.seed, steps=picture.steps, size=f"{picture.side}x{picture.side}"
    )
    return hashlib.sha256(made.data).hexdigest()


async def storm(
    cluster: Cluster,
    plan: Plan,
    seed: int,
    duration_s: float,
    bound_s: float,
    undisturbed: dict[Picture, str],
    clock: Clock | None,
) -> Report:
    """Load and strikes together, then rest, then the checks."""
    clients = Clients(cluster.url, f"chaos-{seed}-{os.getpid()}", patience_s=SETTLE_S)
    striker, watch = Striker(cluster, seed, clock), Watch(cluster)
    began = time.monotonic()
    watching = asyncio.create_task(watch.run())
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(f"{len(plan.offers)} requests, {len(plan.strikes)} strikes", total=len(plan.offers))

        async def ask(k: int) -> Outcome:
            await _at(began, plan.offers[k].at_s)
            outcome = await clients.ask(plan.offers[k])
            progress.advance(bar)
            return outcome

        async def strike(k: int) -> None:
            await _at(began, plan.strikes[k].at_s)
            await striker.strike(plan.strikes[k])

        asked = [ask(k) for k in range(len(plan.offers))]
        struck: list[Coroutine[Any, Any, Any]] = [strike(k) for k in range(len(plan.strikes))]
        outcomes = (await asyncio.gather(asyncio.gather(*asked), asyncio.gather(*struck)))[0]
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await cluster.wait_ready(bound_s)
    await clients.stories(outcomes)
    pools, leases, kept = await at_rest(cluster)
    children = await cluster.children()
    silence_s = cluster.topology.supervision.heartbeat_timeout_s + PAUSE_PAST_TIMEOUT_S
    restarts = {name: child.restarts for name, child in children.items()}
    invariants = {
        "each accepted request ended once": checks.each_accepted_request_ended_once(outcomes),
        "each client saw one request": checks.each_client_saw_one_request(outcomes, journal_keys(cluster)),
        "every slot is accounted for": checks.every_slot_is_accounted_for(pools, leases, kept),
        "nothing outdated was accepted": checks.nothing_outdated_was_accepted(outcomes, clock_set=clock is not None),
        "everyone came back in time": checks.everyone_came_back(striker.blows, bound_s),
        "only victims restarted, no zombie": checks.only_victims_restarted(restarts, striker.blows, watch.zombies()),
        "same seed, same bytes": checks.same_seed_same_bytes(outcomes, undisturbed),
        "no mailbox over its bound": checks.no_mailbox_overflowed(watch.depths),
        "failed only when at fault": checks.failed_only_when_at_fault(outcomes),
        "no standstill": checks.no_standstill(outcomes, bound_s + silence_s),
        "overflow of intensity is seen in /ready": [],
        "a changed topology loses nothing": [],
    }
    striker.close()
    await clients.close()
    return summary(seed, duration_s, outcomes, striker.blows, sum(restarts.values()), invariants)


async def _at(began: float, at_s: float) -> None:
    await asyncio.sleep(max(0.0, began + at_s - time.monotonic()))


if __name__ == "__main__":
    app()
