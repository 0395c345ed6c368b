"""An open-loop load: requests are sent when they are due, however many are still open.

Latency counts from the moment at which a request was due, so that a server that falls behind cannot hide it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Final, Literal, NamedTuple

import httpx

from triptych.api.client import ClientError, read_json
from triptych.percentile import percentile

Arrivals = Literal["poisson", "constant"]

DONE: Final = "done"
UNFINISHED: Final = "unfinished"
"""It was open when the load was ended."""
_UNSENT: Final = "unsent"
"""Too many were open."""
_PERCENTILES: Final = (50, 90, 95, 99)
_POLL_S: Final = 0.5
_POLL_HEADER: Final = "openai-poll-after-ms"
_DELETE_TIMEOUT_S: Final = 3.0


class Answer(NamedTuple):
    """How a request ended."""

    outcome: str
    """"done", "http_STATUS", "failed" of a video, "timeout", "unreachable", "unfinished" or "unsent"."""
    request_id: str = ""
    detail: str = ""
    """The sentence of the server, or of the error."""


class Result(NamedTuple):
    """A request of a load."""

    number: int
    due_s: float
    """When it was due, in seconds from the begin of the load."""
    late_s: float
    """How much later it was sent: more than a few milliseconds means that this machine is too slow for the load."""
    seconds: float
    """From when it was due to its end."""
    outcome: str
    request_id: str
    detail: str


Send = Callable[[int], Awaitable[Answer]]


def due_times(arrivals: Arrivals, rate: float, seed: int) -> Iterator[float]:
    """Yield when requests are due, in seconds from the begin: `rate` in each second. Pure: a seed makes a sequence."""
    random_gaps = random.Random(seed)  # noqa: S311  a load, no secret
    gaps = (random_gaps.expovariate(rate) if arrivals == "poisson" else 1 / rate for _ in itertools.count())
    return itertools.accumulate(gaps, initial=0.0)


class Load:
    """Sends requests when they are due.

    Args:
        send: Sends a request and waits for its end.
        timeout_s: Longest time of a request.
        most_open: Most requests at a time; those that are due beyond it are not sent, and counted.
        on_result: Called with each result as it comes.
    """

    def __init__(
        self, send: Send, *, timeout_s: float, most_open: int, on_result: Callable[[Result], None] = lambda _: None
    ) -> None:
        self._send = send
        self._timeout_s = timeout_s
        self._most_open = most_open
        self._on_result = on_result
        self._begun = 0.0
        self._open: set[asyncio.Task[None]] = set()
        self.results: list[Result] = []
        """In the order in which they came."""

    @property
    def open(self) -> int:
        """How many requests have no result yet."""
        return len(self._open)

    async def run(self, due: Iterable[float], stop: asyncio.Event) -> None:
        """Send requests at the given times, and wait for all results; once `stop` is set, for none."""
        self._begun = asyncio.get_running_loop().time()
        for number, due_s in enumerate(due):
            if await _set_within(stop, self._begun + due_s - asyncio.get_running_loop().time()):
                break
            if len(self._open) >= self._most_open:
                self._record(number, due_s, due_s, Answer(_UNSENT))
                continue
            task = asyncio.create_task(self._one(number, due_s))
            self._open.add(task)
            task.add_done_callback(self._open.discard)
        stopped = asyncio.create_task(stop.wait())
        while self._open and not stop.is_set():
            await asyncio.wait({*self._open, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        left = tuple(self._open)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _one(self, number: int, due_s: float) -> None:
        sent = asyncio.get_running_loop().time() - self._begun
        answer = Answer(UNFINISHED)
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._send(number)
        except TimeoutError:
            answer = Answer("timeout")
        except httpx.HTTPError as error:
            answer = Answer("unreachable", detail=str(error) or type(error).__name__)
        except ClientError as error:
            answer = Answer("unreadable", detail=str(error))
        finally:
            self._record(number, due_s, sent, answer)

    def _record(self, number: int, due_s: float, sent_s: float, answer: Answer) -> None:
        now = asyncio.get_running_loop().time() - self._begun
        result = Result(number, due_s, max(0.0, sent_s - due_s), now - due_s, *answer)
        self.results.append(result)
        self._on_result(result)


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait until an event is set, at most so long; return whether it is."""
    if seconds > 0:
        try:
            async with asyncio.timeout(seconds):
                await event.wait()
        except TimeoutError:
            return False
    else:
        await asyncio.sleep(0)  # what was sent runs, however late this is
    return event.is_set()


async def send_image(http: httpx.AsyncClient, body: dict[str, object]) -> Answer:
    """Ask for images, and wait for them; raises `httpx.HTTPError`, and `ClientError` for an answer without JSON."""
    answer = await http.post("/v1/images/generations", json=body)
    return _refused(answer) or Answer(DONE, str(read_json(answer).get("id", "")))


async def send_video(http: httpx.AsyncClient, body: dict[str, object]) -> Answer:
    """Ask for a video, and ask how it is until it has ended; delete it when cancelled. Raises as `send_image`."""
    answer = await http.post("/v1/videos", json=body)
    while not (refused := _refused(answer)):
        video = read_json(answer)
        if video["status"] == "completed":
            return Answer(DONE, str(video["id"]))
        if video["status"] == "failed":
            return Answer("failed", str(video["id"]), str((video.get("error") or {}).get("message", "")))
        try:
            await asyncio.sleep(float(answer.headers.get(_POLL_HEADER, 1000 * _POLL_S)) / 1000)
            answer = await http.get(f"/v1/videos/{video['id']}")
        except asyncio.CancelledError:  # by Ctrl-C or --timeout, or by both
            deletion = asyncio.create_task(_delete_video(http, str(video["id"])))
            while not deletion.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait({deletion})
            raise
    return refused


async def _delete_video(http: httpx.AsyncClient, video_id: str) -> None:
    """Cancel a video that nobody waits for any more, if that takes some seconds at most."""
    with contextlib.suppress(httpx.HTTPError, TimeoutError):  # the load is over: there is nobody to tell
        async with asyncio.timeout(_DELETE_TIMEOUT_S):
            await http.delete(f"/v1/videos/{video_id}")


def _refused(answer: httpx.Response) -> Answer | None:
    if answer.is_success:
        return None
    try:
        read_json(answer)
    except ClientError as error:
        return Answer(f"http_{answer.status_code}", answer.headers.get("x-request-id", ""), str(error))
    return Answer(f"http_{answer.status_code}")


class Summary(NamedTuple):
    """What a load has measured."""

    outcomes: dict[str, int]
    """How many requests ended so."""
    duration_s: float
    """From the begin to the last result."""
    offered_per_s: float
    """Requests that were due in a second."""
    done_per_s: float
    seconds: dict[str, float]
    """Latency of those that are done: mean, p50, p90, p95, p99, max; empty without any."""
    late_s: float
    """The most that one was sent late."""


def summarize(results: Sequence[Result]) -> Summary:
    """Sum up results. Pure."""
    done = sorted(result.seconds for result in results if result.outcome == DONE)
    duration_s = max((result.due_s + result.seconds for result in results), default=0.0)
    span_s = max((result.due_s for result in results), default=0.0)
    seconds = {}
    if done:
        seconds = {"mean": sum(done) / len(done)}
        seconds |= {f"p{percent}": percentile(done, percent) for percent in _PERCENTILES}
        seconds["max"] = done[-1]
    return Summary(
        dict(Counter(result.outcome for result in results)),
        duration_s,
        (len(results) - 1) / span_s if span_s else 0.0,
        len(done) / duration_s if duration_s else 0.0,
        seconds,
        max((result.late_s for result in results), default=0.0),
    )
