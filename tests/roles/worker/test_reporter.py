from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import structlog

from triptych.bus import (
    AskTimeoutError,
    BusError,
    Delivery,
    Mailbox,
    MailboxFullError,
    Message,
    MessageTooLongError,
    Outbox,
    RemoteError,
    UnreachableError,
)
from triptych.roles.messages.common import Attempt, LeaseRef, StoredPayload
from triptych.roles.messages.stages import Acknowledged, StageFailed, StageOutputsStored, StageStarted
from triptych.roles.worker.reporter import (
    MAX_HEAD_FAILURES,
    DeliveryOutcome,
    FencedError,
    Reporter,
    delivery_outcome,
)

Answer = Callable[[Delivery], None]
Body = Callable[["FakeHead", Reporter], Awaitable[None]]


def report(number: int) -> StageStarted:
    return StageStarted(Attempt(f"r/{number}", 1), "denoiser")


def acknowledge(delivery: Delivery) -> None:
    delivery.reply(Acknowledged())


class FakeHead:
    """A head's mailbox that answers each report as the script says, then acknowledges all."""

    def __init__(self, address: str, *script: Answer) -> None:
        self.mailbox = Mailbox("head", address, (StageStarted, StageFailed, StageOutputsStored))
        self.script = list(script)
        self.seen: asyncio.Queue[Message] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> FakeHead:
        await self.mailbox.start()
        self.task = asyncio.create_task(self.serve())
        return self

    async def serve(self) -> None:
        while True:
            delivery = await self.mailbox.receive()
            (self.script.pop(0) if self.script else acknowledge)(delivery)
            await self.seen.put(delivery.message)

    async def __aexit__(self, *_: object) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.mailbox.close()

    async def saw(self, count: int) -> list[Message]:
        return [await self.seen.get() for _ in range(count)]


class RunningReporter:
    """A reporter on a real outbox, running."""

    def __init__(self, address: str) -> None:
        self.outbox = Outbox("denoiser-0", 5)
        self.head = self.outbox.reference("head", address)
        self.reporter = Reporter(structlog.get_logger())
        self.task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> RunningReporter:
        self.task = asyncio.create_task(
            self.reporter.run(lambda message: self.head.ask(message, Acknowledged, timeout_s=5.0))
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.outbox.close()


def within(seconds: float, test: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await test

    asyncio.run(bounded())


def fails(code: str) -> Answer:
    return lambda delivery: delivery.fail(code, "no")


def scenario(tmp_path: Path, *script: Answer) -> Callable[[Callable[[FakeHead, Reporter], Awaitable[None]]], None]:
    """Run a test with a head and a reporter at the two ends of a real wire."""
    address = f"ipc://{tmp_path}/head"

    async def both(body: Body) -> None:
        async with FakeHead(address, *script) as head, RunningReporter(address) as running:
            await body(head, running.reporter)

    return lambda body: within(20, both(body))


def test_reports_arrive_in_order_and_once(tmp_path: Path) -> None:
    async def body(head: FakeHead, reporter: Reporter) -> None:
        reporter.resume()
        for k in range(50):
            reporter.add(report(k))
        await reporter.flushed()
        assert await head.saw(50) == [report(k) for k in range(50)]
        assert head.seen.empty()

    scenario(tmp_path)(body)


def test_nothing_is_sent_before_the_instance_is_registered(tmp_path: Path) -> None:
    async def body(head: FakeHead, reporter: Reporter) -> None:
        reporter.add(report(1))
        reporter.add(report(2))
        assert reporter.attempts == (Attempt("r/1", 1), Attempt("r/2", 1))
        reporter.resume()
        await reporter.flushed()
        assert await head.saw(2) == [report(1), report(2)]
        assert reporter.pending == ()

    scenario(tmp_path)(body)


def test_a_report_that_is_not_acknowledged_is_sent_again_before_the_next(tmp_path: Path) -> None:
    async def body(head: FakeHead, reporter: Reporter) -> None:
        reporter.resume()
        reporter.add(report(1))
        reporter.add(report(2))
        await reporter.flushed()
        assert await head.saw(4) == [report(1), report(1), report(1), report(2)]
        assert reporter.dropped == 0

    scenario(tmp_path, fails("handler_failed"), fails("stopping"))(body)


def test_a_report_that_is_too_long_to_be_sent_says_at_least_that_the_work_has_ended(tmp_path: Path) -> None:
    async def body(head: FakeHead, reporter: Reporter) -> None:
        reporter.resume()
        block = StoredPayload(LeaseRef("pool", 1, 1, 0, 64), b"x" * 2**21, 0, 64)
        reporter.add(StageOutputsStored(Attempt("r/0", 1), "denoiser", block, 0.1, issued=7))
        reporter.add(report(1))
        await reporter.flushed()
        failed, following = await head.saw(2)
        assert isinstance(failed, StageFailed)
        assert (failed.attempt, failed.stage, failed.retryable, failed.issued) == (
            Attempt("r/0", 1),
            "denoiser",
            False,
            7,
        )
        assert "cannot be sent" in failed.error
        assert following == report(1)

    scenario(tmp_path)(body)


def test_a_report_that_the_head_cannot_read_is_given_up_and_counted(tmp_path: Path) -> None:
    async def body(head: FakeHead, reporter: Reporter) -> None:
        reporter.resume()
        reporter.add(report(1))
        reporter.add(report(2))
        await reporter.flushed()
        assert await head.saw(2) == [report(1), report(2)]
        assert reporter.dropped == 1

    scenario(tmp_path, fails("invalid_message"))(body)


def test_a_report_at_which_the_head_fails_each_time_is_given_up(tmp_path: Path) -> None:
    async def body(head: FakeHead, reporter: Reporter) -> None:
        reporter.resume()
        reporter.add(report(1))
        await reporter.flushed()
        await head.saw(MAX_HEAD_FAILURES)
        assert head.seen.empty()
        assert reporter.dropped == 1

    scenario(tmp_path, *[fails("handler_failed")] * MAX_HEAD_FAILURES)(body)


@pytest.mark.parametrize("code", ["fenced", "stale_generation"])
def test_an_incarnation_that_was_given_up_ends(tmp_path: Path, code: str) -> None:
    address = f"ipc://{tmp_path}/head"

    async def body() -> None:
        async with FakeHead(address, fails(code)), RunningReporter(address) as running:
            running.reporter.resume()
            running.reporter.add(report(1))
            assert running.task is not None
            with pytest.raises(FencedError, match="given this incarnation up"):
                await running.task

    within(20, body())


def test_no_report_is_lost_when_the_head_is_replaced(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/head"

    async def body() -> None:
        async with RunningReporter(address) as running:
            reporter = running.reporter
            async with FakeHead(address, acknowledge, lambda _: None) as first:
                reporter.resume()
                for k in range(5):
                    reporter.add(report(k))
                assert await first.saw(2) == [report(0), report(1)]  # the second is never acknowledged
            reporter.pause()
            async with FakeHead(address) as second:
                reporter.resume()
                await reporter.flushed()
                assert await second.saw(4) == [report(k) for k in range(1, 5)]

    within(20, body())


@pytest.mark.parametrize(
    ("error", "failures", "expected"),
    [
        (AskTimeoutError("x"), 0, DeliveryOutcome.RETRY),
        (UnreachableError("x"), 0, DeliveryOutcome.RETRY),
        (MailboxFullError("x"), 0, DeliveryOutcome.RETRY),
        (MessageTooLongError("x"), 0, DeliveryOutcome.DROP),
        (RemoteError("deadline_exceeded", "x"), 0, DeliveryOutcome.RETRY),
        (RemoteError("handler_failed", "x"), 1, DeliveryOutcome.RETRY),
        (RemoteError("handler_failed", "x"), MAX_HEAD_FAILURES, DeliveryOutcome.DROP),
        (RemoteError("unknown_message", "x"), 0, DeliveryOutcome.DROP),
        (RemoteError("fenced", "x"), 0, DeliveryOutcome.FENCED),
    ],
)
def test_verdicts(error: BusError, failures: int, expected: DeliveryOutcome) -> None:
    assert delivery_outcome(error, failures) is expected
