"""`triptych status`: every actor of a running system."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from triptych.actors.child_state import ChildState
from triptych.actors.command._console import EXIT_BAD_TOPOLOGY, EXIT_FAILED, fail, stdout, styled, table
from triptych.actors.command.generate import KeyFile, Url, api_key, base_url
from triptych.actors.errors import TopologyError
from triptych.actors.topology import load_topology
from triptych.api.client import ClientError, authorization, read_json, timeout, unreachable

_WATCH_EVERY_S: Final = 1.0
_HOST_COLUMNS: Final = ("host", "state", "address", "components", "restarts", "given up")
_COLUMNS: Final = ("name", "state", "pid", "restarts", "uptime", "mailbox", "slots", "detail")


def status(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="The topology, for its URL; see also --url.", show_default=False),
    ] = None,
    url: Url = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the answer of the API.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every second until Ctrl-C.")] = False,
    key_file: KeyFile = None,
) -> None:
    """Show every actor of a running system.

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
                stdout().print(_shown(_look(http, target), as_json=as_json), soft_wrap=as_json)
        except ClientError as error:
            fail(str(error), EXIT_FAILED)
        except KeyboardInterrupt:
            return  # this is how --watch ends


def _watch(http: httpx.Client, url: str, *, as_json: bool) -> None:
    console = stdout()
    if not console.is_terminal:  # one answer after the other, as a log
        while True:
            console.print(_shown(_look(http, url), as_json=as_json), soft_wrap=as_json)
            time.sleep(_WATCH_EVERY_S)
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            try:
                live.update(_shown(_look(http, url), as_json=as_json), refresh=True)
            except ClientError as error:  # it may come back, so go on watching
                live.update(Text(str(error), style="red"), refresh=True)
            time.sleep(_WATCH_EVERY_S)


def _look(http: httpx.Client, url: str) -> dict[str, Any]:
    try:
        return read_json(http.get("/v1/cluster"))
    except httpx.HTTPError as error:
        raise unreachable(url, error) from error


def _shown(cluster: dict[str, Any], *, as_json: bool) -> RenderableType:
    if as_json:
        return Text(json.dumps(cluster, indent=2))
    return render(cluster)


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
