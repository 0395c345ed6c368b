"""The load of `triptych bench`: when requests are due, how they are counted, and its plots."""

from __future__ import annotations

import asyncio
import itertools
from xml.etree import ElementTree

import httpx
import pytest

from triptych.actors.command._load import DONE, Answer, Load, Result, due_times, send_video, summarize
from triptych.actors.command._load_plots import bar, course, histogram, svg


def test_arrivals_have_their_rate_and_a_seed_makes_them_again() -> None:
    constant = list(itertools.islice(due_times("constant", 4.0, 0), 5))
    assert constant == [0.0, 0.25, 0.5, 0.75, 1.0]
    many = list(itertools.islice(due_times("poisson", 4.0, 7), 4000))
    assert many[-1] == pytest.approx(1000, rel=0.05)
    assert list(itertools.islice(due_times("poisson", 4.0, 7), 4000)) == many
    assert next(itertools.islice(due_times("poisson", 4.0, 8), 1, None)) != many[1]


def test_requests_are_sent_when_they_are_due_though_none_is_done() -> None:
    async def scenario() -> None:
        begun: list[int] = []
        all_begun = asyncio.Event()

        async def send(number: int) -> Answer:
            begun.append(number)
            if len(begun) == 4:
                all_begun.set()
            await all_begun.wait()
            return Answer(DONE, f"r{number}")

        load = Load(send, timeout_s=30.0, most_open=4)
        await load.run([0.0, 0.01, 0.02, 0.03], asyncio.Event())
        assert sorted(begun) == [0, 1, 2, 3]
        first, *_, last = sorted(load.results)
        assert first.seconds > last.seconds, "time counts from when a request was due"
        assert summarize(load.results).outcomes == {DONE: 4}

    asyncio.run(scenario())


def test_each_end_of_a_request_is_counted() -> None:
    async def scenario() -> None:
        stop = asyncio.Event()

        async def send(number: int) -> Answer:
            if number == 0:
                raise httpx.ConnectError("refused")
            if number == 1:
                return Answer("http_429", detail="busy")
            if number == 2:
                await asyncio.Event().wait()  # until the load is ended
            raise AssertionError("sent beyond the most that may be open")

        load = Load(send, timeout_s=30.0, most_open=1, on_result=lambda result: result.number == 3 and stop.set())
        await load.run([0.0, 0.01, 0.02, 0.03, 999.0], stop)
        assert [result.outcome for result in sorted(load.results)] == [
            "unreachable", "http_429", "unfinished", "unsent",
        ]  # fmt: skip
        slow = Load(send, timeout_s=0.01, most_open=3)
        await slow.run([0.0, 0.0, 0.0], asyncio.Event())
        assert max(slow.results).outcome == "timeout"

    asyncio.run(scenario())


def test_a_video_is_asked_for_until_it_has_ended() -> None:
    states = iter(["queued", "in_progress", "completed"])

    def answer(request: httpx.Request) -> httpx.Response:
        assert (request.method, request.url.path) in {("POST", "/v1/videos"), ("GET", "/v1/videos/v1")}
        return httpx.Response(200, json={"id": "v1", "status": next(states)}, headers={"openai-poll-after-ms": "1"})

    async def scenario() -> None:
        async with httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(answer)) as http:
            assert await send_video(http, {"prompt": "x"}) == Answer(DONE, "v1")

    asyncio.run(scenario())


def test_a_video_that_nobody_waits_for_any_more_is_deleted() -> None:
    deleted: list[str] = []

    async def scenario() -> None:
        asked, deleting, answered = (asyncio.Event() for _ in range(3))

        async def answer(request: httpx.Request) -> httpx.Response:
            if request.method == "GET":
                asked.set()
            if request.method == "DELETE":
                deleting.set()
                await answered.wait()
                deleted.append(request.url.path)
            return httpx.Response(200, json={"id": "v1", "status": "queued"}, headers={"openai-poll-after-ms": "1"})

        async with httpx.AsyncClient(base_url="http://x", transport=httpx.MockTransport(answer)) as http:
            task = asyncio.create_task(send_video(http, {"prompt": "x"}))
            async with asyncio.timeout(30):
                await asked.wait()
                task.cancel()  # as by --timeout
                await deleting.wait()
                task.cancel()  # as by Ctrl-C
                await asyncio.wait({task}, timeout=0)
                answered.set()
                with pytest.raises(asyncio.CancelledError):
                    await task

    asyncio.run(scenario())
    assert deleted == ["/v1/videos/v1"]


RESULTS = [
    *(Result(n, n / 10, 0.0, 0.1 * (n + 1), DONE, f"r{n}", "") for n in range(10)),
    Result(10, 1.0, 0.2, 0.5, "http_429", "", "<busy>"),
]


def test_results_are_summed_up() -> None:
    summary = summarize(RESULTS)
    assert summary.outcomes == {DONE: 10, "http_429": 1}
    assert (summary.offered_per_s, summary.late_s) == (10.0, 0.2)
    assert summary.duration_s == pytest.approx(1.9)
    assert summary.done_per_s == pytest.approx(10 / 1.9)
    assert summary.seconds == pytest.approx({"mean": 0.55, "p50": 0.5, "p90": 0.9, "p95": 1.0, "p99": 1.0, "max": 1.0})
    assert summarize([]).seconds == {}


def test_plots_have_every_request() -> None:
    lines = histogram([result.seconds for result in RESULTS])
    assert sum(int(line.split()[-1]) for line in lines) == len(RESULTS)
    assert (histogram([]), histogram([0.5, 0.5])[0].split()[-1]) == ([], "2")
    assert (bar(1.0), len(bar(0.5)), bar(0.0)) == ("█" * 40, 20, "")
    assert len(course(RESULTS).strip()) <= 60
    assert course(RESULTS).strip()[-1] == "█"
    drawn = ElementTree.fromstring(svg(RESULTS, summarize(RESULTS), 'a & "b"'))
    circles = drawn.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == len(RESULTS) + 2, "and two of the legend"
    assert ElementTree.fromstring(svg([], summarize([]), "none")) is not None
