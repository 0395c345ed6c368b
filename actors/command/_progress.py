"""Follow a request from a terminal, with a bar of its steps, until it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from triptych.actors.command._console import stderr
from triptych.api.client import ClientError, read_json, summarize_causes, unreachable
from triptych.roles.head.job import State

POLL_EVERY_S: Final = 0.2
API_AWAY_TIMEOUT_S: Final = 30.0
"""How long the API may be unreachable, as it is while it restarts."""


def wait_until_finished(
    http: httpx.Client,
    request: dict[str, Any],
    pause: Callable[[float], None] = time.sleep,
    look: Callable[[dict[str, Any]], None] = lambda _: None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Wait until a request ends, and show how far it is.

    Args:
        http: A client with the base URL of the API.
        request: As `GET /v1/requests/{id}` answers.
        pause: Called with the seconds to sleep.
        look: Called with the request each time that it was asked for.
        console: Where the bar is shown; it is on stderr.

    Returns:
        The request as it ended.

    Raises:
        ClientError: The request failed, or the API is unreachable.
    """
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # On stderr, and removed at the end, so that stdout has nothing but what was asked for.
    with Progress(*columns, console=console or stderr(), transient=True) as progress:
        bar = progress.add_task(state_in_words(request), total=None)
        while not request["terminal"]:
            pause(POLL_EVERY_S)
            request = _fetch(http, request["id"], pause)
            look(request)
            unit = request["units"][0]
            # A unit counts its steps only while it denoises: afterwards, all of them are done.
            steps = max(unit["step"], progress.tasks[bar].completed)
            progress.update(
                bar, description=state_in_words(request), completed=steps, total=unit["total_steps"] or None
            )
    if request["state"] != State.DONE:
        raise ClientError(f"the request is {request['state']}: {failure_reason(request)}")
    return request


def state_in_words(request: dict[str, Any]) -> str:
    """Return the state in small letters, such as "denoising running"."""
    return str(request["state"]).lower().replace("_", " ")


def failure_reason(request: dict[str, Any]) -> str:
    """Return why a request failed."""
    return summarize_causes(cause for unit in request["units"] for cause in unit["causes"]) or "no reason is known"


def _fetch(http: httpx.Client, request_id: str, pause: Callable[[float], None]) -> dict[str, Any]:
    left_s = API_AWAY_TIMEOUT_S
    while True:
        try:
            answer = http.get(f"/v1/requests/{request_id}")
        except httpx.TransportError as error:
            if left_s <= 0:
                raise unreachable(str(http.base_url), error) from error
        else:
            if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or left_s <= 0:
                return read_json(answer)
        pause(POLL_EVERY_S)
        left_s -= POLL_EVERY_S
