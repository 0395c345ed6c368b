"""`triptych bench`: put a running system under load, and measure what it does."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Final

import httpx
import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from triptych.actors.command._console import EXIT_FAILED, EXIT_INTERRUPTED, fail, stderr, stdout, table
from triptych.actors.command._load import (
    DONE,
    Answer,
    Arrivals,
    Load,
    Result,
    Summary,
    due_times,
    send_image,
    send_video,
    summarize,
)
from triptych.actors.command._load_plots import course, histogram, svg
from triptych.actors.command.generate import KeyFile, api_key, base_url, parse_settings
from triptych.api.client import ClientError, authorization, request_body, timeout

_PROMPT: Final = "a large red circle on the left of a blue background, number {number}"
_LATE_S: Final = 0.05


def bench(
    url: Annotated[
        str, typer.Argument(metavar="[URL]", help="Base URL of the API; default: as of `status`.", show_default=False)
    ] = "",
    rate: Annotated[float, typer.Option("--rate", "-r", min=0.001, help="Requests that are due in a second.")] = 1.0,
    arrivals: Annotated[Arrivals, typer.Option(help="How the times between two requests vary.")] = "poisson",
    seconds: Annotated[float, typer.Option("--seconds", "-s", min=0.1, help="For how long requests are due.")] = 30.0,
    count: Annotated[
        int | None, typer.Option("-n", min=1, help="How many requests at most.", show_default=False)
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            help="May be repeated: they take turns. {number} in it makes each different, which no prompt cache knows.",
            show_default=_PROMPT,
        ),
    ] = None,
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Default: the model's.", show_default=False)] = "",
    steps: Annotated[
        int | None, typer.Option(min=1, help="Denoising steps; default: the model's own.", show_default=False)
    ] = None,
    model: Annotated[str, typer.Option(metavar="NAME", help="Default: the first.", show_default=False)] = "",
    more: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another parameter of the model.", show_default=False),
    ] = None,
    videos: Annotated[bool, typer.Option("--videos", help="Ask for videos.")] = False,
    seed: Annotated[int, typer.Option(help="Of the arrivals; request k has the seed SEED + k.")] = 0,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.1, help="Longest seconds of a request.")] = 600.0,
    most_open: Annotated[
        int, typer.Option("--most-open", min=1, help="Requests at a time; beyond it they are counted and not sent.")
    ] = 1000,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line for each request, and one at the end.")] = False,
    svg_file: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE", help="Draw each request in this file.", show_default=False)
    ] = None,
    key_file: KeyFile = None,
) -> None:
    """Send requests at a rate, whether or not earlier ones are done, and measure how long each takes.

    Latency counts from when a request was due. Ctrl-C ends the load, cancels what is open and shows what was measured.
    Exits with 1 when no request was done.

    [bold]Examples[/]

    triptych bench http://127.0.0.1:8000 --rate 2 --seconds 60

    triptych bench --rate 10 --arrivals constant -n 100 --steps 4 --size 64x64 --svg load.svg

    triptych bench --videos --rate 0.1 --set num_frames=9 --json | jq .outcome
    """
    extra = parse_settings(more or [], sends_files=False) | ({"model": model} if model else {})
    prompts = prompt or [_PROMPT]

    def body(number: int) -> dict[str, object]:
        text = prompts[number % len(prompts)].replace("{number}", str(number))
        return _body(text, videos=videos, size=size or None, steps=steps, seed=seed + number, extra=extra)

    due = itertools.takewhile(lambda at: at < seconds, itertools.islice(due_times(arrivals, rate, seed), count))
    console = stderr()
    try:
        target = base_url(url)
        if svg_file is not None:
            svg_file.touch()
        headers = authorization(api_key(key_file))
    except ClientError as error:
        fail(str(error), EXIT_FAILED)
    except OSError as error:
        fail(f"{svg_file} cannot be written: {error.strerror}.", EXIT_FAILED)
    runner = _Bench(target, headers, body, videos=videos, timeout_s=timeout_s, most_open=most_open, as_json=as_json)
    interrupted = asyncio.run(runner.run(due, console))
    results = sorted(runner.load.results)
    summary = summarize(results)
    if as_json:
        print(json.dumps({"summary": {**summary._asdict(), "interrupted": interrupted}}))
    else:
        _show(stdout(), results, summary)
    if svg_file is not None:
        title = f"{target}: {arrivals} arrivals, {rate:g} requests/s"
        svg_file.write_text(svg(results, summary, title), encoding="utf-8")
    if summary.late_s > _LATE_S:
        late = f"Requests were sent up to {summary.late_s:.2f} s late: this machine is too slow for the load."
        console.print(late, style="yellow")
    if interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if not summary.outcomes.get(DONE):
        fail(next((each.detail for each in results if each.detail), "No request was done."), EXIT_FAILED)


def _body(prompt: str, *, videos: bool, **given: Any) -> dict[str, object]:
    """Return the body of one request."""
    body = request_body(prompt, **given)
    if videos:
        return {name: value for name, value in body.items() if name not in ("n", "response_format")}
    return body | {"response_format": "url"}  # the file itself would measure the network


class _Bench:
    """A load on one API, shown while it runs."""

    def __init__(
        self,
        url: str,
        headers: dict[str, str],
        body: Callable[[int], dict[str, object]],
        *,
        videos: bool,
        timeout_s: float,
        most_open: int,
        as_json: bool,
    ) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=most_open)
        self._http = httpx.AsyncClient(base_url=url, timeout=timeout(timeout_s), headers=headers, limits=limits)
        self._body = body
        self._done = 0
        self._send_one = send_video if videos else send_image
        self._as_json = as_json
        self._status: Status | None = None
        self._stop = asyncio.Event()
        self._unread: OSError | None = None
        """Why a result could not be printed."""
        self.load = Load(self._send, timeout_s=timeout_s, most_open=most_open, on_result=self._came)

    async def run(self, due: Iterable[float], console: Console) -> bool:
        """Run the load, and return whether Ctrl-C ended it; raises OSError when its results cannot be printed."""
        asyncio.get_running_loop().add_signal_handler(signal.SIGINT, self._stop.set)
        with console.status("Sending") as self._status:
            async with self._http:
                await self.load.run(due, self._stop)
        if self._unread is not None:
            raise self._unread
        return self._stop.is_set()

    async def _send(self, number: int) -> Answer:
        return await self._send_one(self._http, self._body(number))

    def _came(self, result: Result) -> None:
        self._done += result.outcome == DONE
        if self._as_json and self._unread is None:
            try:
                print(json.dumps(result._asdict()), flush=True)
            except OSError as error:  # such as of a pipe that nobody reads: `run` raises it
                self._unread = error
                self._stop.set()
        if self._status is not None:
            others = len(self.load.results) - self._done
            self._status.update(f"{self._done} done, {others} otherwise, {self.load.open} open")


def _show(console: Console, results: list[Result], summary: Summary) -> None:
    """Print what was measured."""
    total = sum(summary.outcomes.values())
    console.print(
        f"{total} requests in {summary.duration_s:.1f} s: {summary.offered_per_s:.2f}/s were due, "
        f"{summary.done_per_s:.2f}/s were done"
    )
    rows = [(escape(outcome), str(number), _example(results, outcome)) for outcome, number in summary.outcomes.items()]
    console.print(table(("outcome", "requests", ""), rows))
    if summary.seconds:
        console.print()
        console.print(table(tuple(summary.seconds), [tuple(f"{value:.3f} s" for value in summary.seconds.values())]))
        console.print()
        for line in histogram([result.seconds for result in results if result.outcome == DONE]):
            console.print(line, markup=False)
        console.print(f"\nmedian over time, up to {summary.seconds['max']:.3f} s\n{course(results)}", markup=False)


def _example(results: Iterable[Result], outcome: str) -> str:
    """Return what the server said of one of the requests that ended so."""
    return escape(next((each.detail for each in results if each.outcome == outcome and each.detail), ""))
