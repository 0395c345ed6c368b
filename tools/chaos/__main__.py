"""`python -m tools.chaos`: strike a cluster under load, and say whether it kept its promises."""

from __future__ import annotations

import asyncio
import hashlib
import os
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress

from actors import launch
from actors.client import ApiError
from actors.cluster import Cluster
from actors.errors import TopologyError
from actors.topology import load_topology
from roles.pool_client import FAULTS as DAMAGE
from tools.chaos import checks
from tools.chaos.load import Clients, Outcome
from tools.chaos.observe import Watch, at_rest, escalation, journal_keys
from tools.chaos.plan import FAULTS, PICTURES, PULL_TIMEOUT_S, Picture, Plan, damage, draw, possible
from tools.chaos.report import Report, show, summary
from tools.chaos.strikes import Striker

SETTLE_S = 90.0
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
console = Console()


@app.command(
    epilog="Examples: python -m tools.chaos examples/chaos.toml --seed 7 --duration 60 --rate 4 --faults all"
    " --json report.json  ·  python -m tools.chaos examples/chaos.toml --faults kill,head"
)
def main(
    topology: Annotated[Path, typer.Argument(help="What to start and strike.")] = Path("examples/chaos.toml"),
    seed: Annotated[int, typer.Option(help="The same seed plans the same load and the same strikes.")] = 7,
    duration: Annotated[float, typer.Option(help="Seconds of load.", min=5, max=3600)] = 60.0,
    rate: Annotated[float, typer.Option(help="Requests a second.", min=0.1, max=50)] = 4.0,
    every: Annotated[float, typer.Option(help="Seconds between two strikes, on average.", min=0.2)] = 2.5,
    faults: Annotated[str, typer.Option(help=f"Some of {','.join(FAULTS)}, or all.")] = "all",
    bound: Annotated[float, typer.Option(help="Most seconds for a victim to be back.")] = 20.0,
    json: Annotated[Path | None, typer.Option("--json", help="Write the report here as well.")] = None,
) -> None:
    """Start TOPOLOGY, offer a seeded load, strike its actors, and check that nothing accepted was lost."""
    chosen = list(FAULTS) if faults == "all" else faults.split(",")
    if unknown := [fault for fault in chosen if fault not in FAULTS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(FAULTS)}", param_hint="--faults")
    try:
        engine = load_topology(topology).engine
        can = possible(chosen, engine)
        if faults != "all" and can != chosen:
            raise typer.BadParameter(f"'late' needs mooncake, and {topology} has {engine}", param_hint="--faults")
        report = asyncio.run(run(topology, seed, duration, rate, every, can, bound))
    except (ApiError, TopologyError) as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(2) from error
    show(report, console)
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report)))
    raise typer.Exit(0 if report.held else 1)


async def run(
    topology: Path, seed: int, duration_s: float, rate: float, every_s: float, faults: list[str], bound_s: float
) -> Report:
    """One whole run; raises `ApiError` and `TopologyError`."""
    with tempfile.TemporaryDirectory(prefix="triptych-chaos-") as state:
        own: dict[str, dict[str, object]] = {"api": {"port": 0}, "state": {"path": state}}
        async with launch(topology, own) as calm:
            undisturbed = await pictures(calm)
        return await strike_and_judge(topology, own, seed, duration_s, rate, every_s, faults, bound_s, undisturbed)


async def strike_and_judge(
    topology: Path,
    own: dict[str, dict[str, object]],
    seed: int,
    duration_s: float,
    rate: float,
    every_s: float,
    faults: list[str],
    bound_s: float,
    undisturbed: dict[Picture, str],
) -> Report:
    """Run the storm, and then the drill for what comes after too many restarts."""
    if "late" in faults:
        own = {**own, "transfer": {"pull_timeout_s": PULL_TIMEOUT_S}}
    os.environ[DAMAGE] = damage(faults)
    try:
        async with launch(topology, own) as cluster:
            plan = draw(seed, duration_s, rate, every_s, faults, victims(cluster))
            report = await storm(cluster, plan, seed, duration_s, bound_s, undisturbed)
    finally:
        del os.environ[DAMAGE]
    if "kill" in faults:
        report.invariants["overflow of intensity is seen in /ready"].extend(await escalation(topology, own))
    return report


async def pictures(cluster: Cluster) -> dict[Picture, str]:
    """SHA-256 of every picture that the load may ask for, made in peace."""
    return {picture: await digest(cluster, picture) for picture in PICTURES}


async def digest(cluster: Cluster, picture: Picture) -> str:
    """SHA-256 of one picture's file."""
    made = await cluster.generate(picture.prompt, seed=picture.seed, steps=picture.steps)
    return hashlib.sha256(made.data).hexdigest()


def victims(cluster: Cluster) -> dict[str, list[str]]:
    """Who may be struck by each fault."""
    components = cluster.topology.components
    roles = [c.name for c in components if c.kind not in ("pool", "head", "api")]
    pools = [c.name for c in components if c.kind == "pool"]
    return {
        "kill": roles,
        "stop": roles,
        "term": roles,
        "head": ["head"],
        "api": ["api"],
        "pool": pools,
        "garbage": [c.name for c in components],
    }


async def storm(
    cluster: Cluster,
    plan: Plan,
    seed: int,
    duration_s: float,
    bound_s: float,
    undisturbed: dict[Picture, str],
) -> Report:
    """Load and strikes together, then rest, then the checks."""
    clients = Clients(cluster.url, f"chaos-{seed}-{os.getpid()}", patience_s=SETTLE_S)
    striker, watch = Striker(cluster, seed), Watch(cluster)
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
    restarts = {name: child.restarts for name, child in children.items()}
    invariants = {
        "each accepted request ended once": checks.each_accepted_request_ended_once(outcomes),
        "each client saw one request": checks.each_client_saw_one_request(outcomes, journal_keys(cluster)),
        "every slot is accounted for": checks.every_slot_is_accounted_for(pools, leases, kept),
        "nothing outdated was accepted": checks.nothing_outdated_was_accepted(outcomes),
        "everyone came back in time": checks.everyone_came_back(striker.blows, bound_s),
        "only victims restarted, no zombie": checks.only_victims_restarted(restarts, striker.blows, watch.zombies()),
        "same seed, same bytes": checks.same_seed_same_bytes(outcomes, undisturbed),
        "no mailbox over its bound": checks.no_mailbox_overflowed(watch.depths),
        "failed only when at fault": checks.failed_only_when_at_fault(outcomes, cluster.topology.head.max_attempts),
        "overflow of intensity is seen in /ready": [],
    }
    striker.close()
    await clients.close()
    return summary(seed, duration_s, outcomes, striker.blows, sum(restarts.values()), invariants)


async def _at(began: float, at_s: float) -> None:
    await asyncio.sleep(max(0.0, began + at_s - time.monotonic()))


if __name__ == "__main__":
    app()
