"""`triptych status`: every actor of a running system."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, NoReturn

import httpx
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from triptych.actors.child_state import ChildState
from triptych.actors.command._activity import Look, Queue, Rates, queues, rates, read_look
from triptych.actors.command._console import EXIT_BAD_TOPOLOGY, EXIT_FAILED, fail, stderr, stdout, styled, table
from triptych.actors.command.generate import KeyFile, Url, api_key, base_url
from triptych.actors.errors import TopologyError
from triptych.actors.topology import load_topology
from triptych.api.client import ClientError, authorization, read_json, timeout, unreachable

_WATCH_EVERY_S: Final = 1.0
_HOST_COLUMNS: Final = ("host", "state", "address", "components", "restarts", "given up")
_COLUMNS: Final = ("name", "state", "pid", "restarts", "uptime", "mailbox", "slots", "detail")
_QUEUE_COLUMNS: Final = ("stage", "waiting", "running", "predicted")
_UP: Final = (ChildState.READY, ChildState.ASLEEP)


def status(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="The topology, for its URL; see also --url.", show_default=False),
    ] = None,
    url: Url = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer of the API.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Refresh every second until Ctrl-C; a line each where that is no terminal.")
    ] = False,
    key_file: KeyFile = None,
) -> None:
    """Show every host and actor of a running system, its queues, and with --watch what it does in a second.

    Exits with 1 when the API cannot be reached.

    [bold]Examples[/]

    triptych status examples/demo.toml

    triptych status --url http://127.0.0.1:8000 --watch

    triptych status --json | jq '.actors[] | select(.state != "ready")'
    """
    try:
        target = load_topology(file).url if file and not url else base_url(url)
        key = api_key(key_file)
    except TopologyError as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    except ClientError as error:
        fail(str(error), EXIT_FAILED)
    with httpx.Client(base_url=target, timeout=timeout(), headers=authorization(key)) as http:
        try:
            if watch:
                _watch(http, target, as_json=as_json)
            else:
                seen = _look(http, target)
                stdout().print(
                    Text(json.dumps(seen.cluster, indent=2)) if as_json else render_seen(seen), soft_wrap=as_json
                )
        except ClientError as error:
            fail(str(error), EXIT_FAILED)
        except KeyboardInterrupt:
            return  # this is how --watch ends


class Seen(NamedTuple):
    """What was seen of a system at one moment."""

    cluster: dict[str, Any]
    """The answer of `GET /v1/cluster`."""
    look: Look | None
    """Its metrics; None from an API that has none."""
    rates: Rates | None = None
    """Since the look before."""


def _watch(http: httpx.Client, url: str, *, as_json: bool) -> None:
    console = stdout()
    if as_json or not console.is_terminal:
        _print_lines(http, url, as_json=as_json)
    with Live(console=console, auto_refresh=False, screen=False, vertical_overflow="crop") as live:
        for seen in _looks(http, url):
            live.update(render_seen(seen) if isinstance(seen, Seen) else Text(seen, style="red"), refresh=True)


def _print_lines(http: httpx.Client, url: str, *, as_json: bool) -> NoReturn:
    """Print a line for each look, as a log."""
    while True:
        for seen in _looks(http, url):
            if isinstance(seen, str):
                stderr().print(seen, style="red", markup=False)
            else:
                print(json.dumps(seen.cluster) if as_json else summarize(seen), flush=True)


def _looks(http: httpx.Client, url: str) -> Iterator[Seen | str]:
    """Yield what is seen each second; a sentence where the API does not answer: it may come back."""
    before: Look | None = None
    while True:
        try:
            seen = _look(http, url)
            if before is not None and seen.look is not None:
                seen = seen._replace(rates=rates(before, seen.look))
            before = seen.look
            yield seen
        except ClientError as error:
            yield str(error)
        time.sleep(_WATCH_EVERY_S)


def _look(http: httpx.Client, url: str) -> Seen:
    try:
        cluster = read_json(http.get("/v1/cluster"))
        metrics = http.get("/metrics")
    except httpx.HTTPError as error:
        raise unreachable(url, error) from error
    return Seen(cluster, read_look(metrics.text, time.monotonic()) if metrics.is_success else None)


def render_seen(seen: Seen) -> RenderableType:
    """Return everything that is known of a system, as tables."""
    if seen.look is None:
        return render(seen.cluster)
    found = queues(seen.look)
    several = len({queue.model for queue in found}) > 1
    rows = [(*((escape(queue.model),) if several else ()), *_queue(queue)) for queue in found]
    columns = (*(("model",) if several else ()), *_QUEUE_COLUMNS)
    activity: list[RenderableType] = [table(columns, rows)]
    if seen.rates is not None:
        activity.append(Text(_rates(seen.rates)))
    return Group(*activity, Text(), render(seen.cluster))


def summarize(seen: Seen) -> str:
    """Return what is known of a system, in one line. Pure."""
    actors, hosts = seen.cluster.get("actors", ()), seen.cluster.get("hosts", ())
    up = sum(actor.get("state") in _UP for actor in actors)
    parts = ["ready" if seen.cluster.get("ready") else "not ready", f"{up} of {len(actors)} actors"]
    if hosts:
        parts.append(f"{sum(host.get('state') == ChildState.READY for host in hosts)} of {len(hosts)} hosts")
    if seen.look is not None:
        found = queues(seen.look)
        waiting, running = sum(queue.waiting for queue in found), sum(queue.running for queue in found)
        parts.append(f"{waiting} jobs wait, {running} run")
    if seen.rates is not None:
        parts.append(_rates(seen.rates))
    if reasons := seen.cluster.get("reasons"):
        parts.append("; ".join(map(str, reasons)))
    return ", ".join(parts)


def _queue(queue: Queue) -> tuple[str, ...]:
    return queue.stage, str(queue.waiting), str(queue.running), f"{queue.queued_s:.1f} s" if queue.waiting else ""


def _rates(found: Rates) -> str:
    """Say what was done in a second."""
    done = found.requests.get("done", 0.0)
    ended = [
        f"{rate:.1f} {outcome.replace('_', ' ')}/s"
        for outcome, rate in found.requests.items()
        if rate and outcome != "done"
    ]
    batch = f" of {found.batch:.1f} requests" if found.batch > 1 else ""
    return ", ".join(
        [f"{done:.1f} requests/s", *ended, f"{found.steps:.1f} steps/s{batch}", f"{_size(int(found.nbytes))}/s"]
    )


def render(cluster: dict[str, Any]) -> RenderableType:
    """Return the answer of `GET /v1/cluster` as a table; fields that an API of another version lacks are left out."""
    actors = cluster.get("actors", ())
    hosts = cluster.get("hosts", ())
    rows = [_row(actor, _start(actor, actors), with_host=bool(hosts)) for actor in actors]
    columns = ("name", *(("host",) if hosts else ()), *_COLUMNS[1:])
    reasons = "".join(f"\n  {escape(str(reason))}" for reason in cluster.get("reasons", ()))
    headline = "[green]ready[/]" if cluster.get("ready") else f"[red]not ready[/]{reasons}"
    pools = [_pool(pool) for pool in cluster.get("pools", ())]
    pools += _models((cluster.get("head") or {}).get("models") or {})
    pools += _prompt_cache((cluster.get("head") or {}).get("prompt_cache") or {})
    tables: list[RenderableType] = [table(_HOST_COLUMNS, map(_host, hosts)), Text()] if hosts else []
    return Group(Text.from_markup(headline), *tables, table(columns, rows), *(Text.from_markup(pool) for pool in pools))


def _start(actor: dict[str, Any], actors: Sequence[dict[str, Any]]) -> str:
    """Return how long each part of a process's start took, and the first calls of its actors."""
    if not (parts := actor.get("start_s")):
        return ""
    shares = [f"{name} {seconds:.1f} s" for name, seconds in parts.items() if name != "start"]
    rest = parts.get("start", 0.0) - sum(parts[name] for name in parts.keys() - {"launch", "import", "start"})
    shares += [f"other {rest:.1f} s"]
    for other in actors:
        if other.get("component") == actor.get("component"):
            facts = other.get("facts") or {}
            first = {name: value for name, value in facts.items() if name.startswith("first_") and name.endswith("_s")}
            shares += [f"{name[:-2].replace('_', ' ')} {value:.1f} s" for name, value in first.items()]
    return ", ".join(shares)


def _host(host: dict[str, Any]) -> tuple[str, ...]:
    return (
        escape(str(host.get("name", "?"))),
        styled(str(host.get("state", "?"))),
        escape(str(host.get("address", ""))),
        escape(", ".join(host.get("components", ()))),
        str(host.get("restarts", "")),
        escape(", ".join(host.get("gave_up", ()))),
    )


def _row(actor: dict[str, Any], start: str, *, with_host: bool) -> tuple[str, ...]:
    depth, capacity = actor.get("mailbox_depth"), actor.get("mailbox_capacity")
    slots, credits_ = actor.get("slots"), actor.get("credits")
    return (
        escape(str(actor.get("name", "?"))),
        *((escape(str(actor.get("host", ""))),) if with_host else ()),
        styled(str(actor.get("state", "?"))),
        str(actor.get("pid") or ""),
        str(actor.get("restarts", "")),
        _duration(actor.get("uptime_s")),
        "" if depth is None else f"{depth}/{capacity}",
        "" if slots is None else f"{credits_} of {slots} free",
        escape(str(actor.get("detail", "")) or start),
    )


def _pool(pool: dict[str, Any]) -> str:
    name = escape(str(pool.get("name", "pool")))
    if pool.get("state") == ChildState.DOWN:
        return f"{name}: [red]down[/]"
    return (
        f"{name}: {_size(pool.get('free'))} of {_size(pool.get('capacity'))} free, {escape(str(pool.get('transport')))}"
    )


def _models(models: dict[str, Any]) -> list[str]:
    """Return the state of each model, if there are several."""
    if len(models) < 2:
        return []
    return [f"models: {', '.join(f'{escape(str(name))} is {state}' for name, state in models.items())}"]


def _prompt_cache(cache: dict[str, Any]) -> list[str]:
    if not cache.get("capacity"):
        return []
    entries, hits, misses = (cache.get(name, "?") for name in ("entries", "hits", "misses"))
    used = f"{_size(cache.get('nbytes'))} of {_size(cache['capacity'])}"
    return [f"prompt cache: {entries} prompts in {used}, {hits} hits, {misses} misses"]


def _size(nbytes: object) -> str:
    return f"{nbytes / (1 << 20):.1f} MiB" if isinstance(nbytes, int) else "?"


def _duration(seconds: object) -> str:
    if not isinstance(seconds, int | float):
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02}m" if hours else f"{minutes}m {rest:02}s" if minutes else f"{rest}s"
