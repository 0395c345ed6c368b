"""Messages and handlers, over real mailboxes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.actors.runtime.runtime_harness import (
    AskSender,
    AskSenderLater,
    Done,
    Open,
    RuntimeHarness,
    SentBy,
    Tell,
    Texts,
    Told,
    Work,
    Worker,
    ask,
    busy_worker,
    crash_of,
    failure_of,
    run,
    until_queued,
)
from triptych.actors.runtime import _actor_cell
from triptych.actors.runtime.system_messages import (
    DeadLetterQuery,
    DeadLetterReport,
    Inspect,
)
from triptych.bus import (
    AskTimeoutError,
    MailboxFullError,
    Outbox,
    Reference,
    RemoteError,
)


@asynccontextmanager
async def three_texts_wait(folder: Path) -> AsyncIterator[tuple[Worker, Reference]]:
    """A worker that waits at its gate, while three texts wait for it."""
    async with busy_worker(folder) as (worker, reference, busy):
        for text in ("a", "b", "c"):
            reference.tell(Tell(text))
        await until_queued(reference, 3)
        yield worker, reference
        await busy


def test_an_actor_learns_once_that_it_has_handled_all_that_waited(folder: Path) -> None:
    async def scenario() -> None:
        async with three_texts_wait(folder) as (worker, reference):
            before = len(worker.texts_when_caught_up)
            worker.gate.set()
            assert await reference.ask(Told(), Texts, timeout_s=5) == Texts(("a", "b", "c"))
            assert worker.texts_when_caught_up[before] == 3

    run(scenario())


def test_a_full_mailbox_does_not_keep_the_loop_from_its_other_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_actor_cell, "MAX_HANDLED", 2)
    texts_at_turns: list[int] = []

    async def scenario() -> None:
        async with three_texts_wait(folder) as (worker, reference):
            loop = asyncio.get_running_loop()
            monkeypatch.setattr(
                worker, "caught_up", lambda: loop.call_soon(lambda: texts_at_turns.append(len(worker.texts)))
            )
            worker.gate.set()
            assert await reference.ask(Told(), Texts, timeout_s=5) == Texts(("a", "b", "c"))
            assert texts_at_turns[0] == 1, "after the first two messages"

    run(scenario())


def test_asks_tells_and_actors_among_each_other(folder: Path) -> None:
    async def scenario() -> None:
        worker, peer = Worker("worker"), Worker("peer")
        harness = RuntimeHarness(folder, worker, peer)
        async with harness.runtime:
            reference = harness.reference("worker")
            assert await ask(reference, "hello") == "hello"
            assert await ask(reference, "peer") == "echo"
            for text in ("a", "b", "c"):
                reference.tell(Tell(text))
            assert await reference.ask(Told(), Texts, timeout_s=5) == Texts(("a", "b", "c"))
            assert (worker.generation, worker.restarts) == (7, 2)
        assert worker.drained

    run(scenario())


def test_actors_of_one_runtime_need_no_socket_to_each_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        worker, peer = Worker("worker"), Worker("peer")
        async with RuntimeHarness(folder, worker, peer).runtime:
            monkeypatch.setattr("triptych.bus._outbox.open_socket", None)
            reference = worker.reference("peer")
            reference.tell(Tell("a"))
            assert await reference.ask(Told(), Texts, timeout_s=5) == Texts(("a",))

    run(scenario())


def test_a_refusal_is_an_answer_and_no_crash(folder: Path) -> None:
    async def scenario() -> None:
        harness = RuntimeHarness(folder, Worker("worker"))
        async with harness.runtime:
            with pytest.raises(RemoteError) as caught:
                await ask(harness.reference("worker"), "refuse")
            assert (caught.value.code, caught.value.detail) == ("not_today", "come back tomorrow")
            assert await ask(harness.reference("worker"), "still here") == "still here"

    run(scenario())


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("crash", "ValueError: out of paper"),
        ("cancelled", "was cancelled from within"),
        ("nothing", "work replied None to Work"),
    ],
)
def test_an_unexpected_error_is_answered_and_crashes_the_process(folder: Path, text: str, error: str) -> None:
    async def scenario() -> None:
        worker = Worker("worker")
        failures = []

        async def use(reference: Reference) -> None:
            failures.append(await failure_of(reference, Work("r1", text)))

        crash = await crash_of(RuntimeHarness(folder, worker), use)
        assert error in str(crash)
        assert crash.__cause__ is not None
        assert failures[0].code == ("stopping" if text == "cancelled" else "handler_failed")
        assert not worker.drained

    run(scenario())


def test_an_exception_in_a_spawned_task_crashes_the_actor(folder: Path) -> None:
    async def scenario() -> None:
        async def use(reference: Reference) -> None:
            reference.tell(Tell("spawn a crash"))

        crash = await crash_of(RuntimeHarness(folder, Worker("worker")), use)
        assert str(crash) == "worker crashed: LookupError: no such thing"

    run(scenario())


def test_an_error_of_stats_crashes_the_process(folder: Path) -> None:
    class Miscounting(Worker):
        def stats(self) -> dict[str, int | float | str | bool]:
            return {"per worker": 1 // 0}

    async def scenario() -> None:
        async def use(reference: Reference) -> None:
            reference.tell(Inspect())

        assert "ZeroDivisionError" in str(await crash_of(RuntimeHarness(folder, Miscounting("worker")), use))

    run(scenario())


def test_handlers_run_one_at_a_time_and_a_full_mailbox_says_so(folder: Path) -> None:
    async def scenario() -> None:
        async with busy_worker(folder) as (worker, reference, waiting):
            queued = [asyncio.create_task(ask(reference, str(number))) for number in range(4)]
            await until_queued(reference, 4)
            with pytest.raises(MailboxFullError):
                await ask(reference, "one too many")
            assert not any(task.done() for task in queued)
            worker.gate.set()
            assert await waiting == "wait"
            assert [await task for task in queued] == ["0", "1", "2", "3"]

    run(scenario())


def test_asks_that_wait_when_the_actor_stops_are_answered(folder: Path) -> None:
    async def scenario() -> None:
        async with busy_worker(folder) as (_, reference, waiting):
            queued = asyncio.create_task(ask(reference, "never runs"))
            await until_queued(reference, 1)
        results = await asyncio.gather(waiting, queued, return_exceptions=True)
        # The answer races with the loss of the connection; either way nobody waits for the deadline.
        assert not any(isinstance(result, AskTimeoutError) for result in results)
        assert all(isinstance(result, Exception) for result in results)

    run(scenario())


def test_an_ask_whose_deadline_passes_in_the_queue_is_not_handled(folder: Path) -> None:
    async def scenario() -> None:
        async with busy_worker(folder) as (worker, reference, waiting):
            with pytest.raises(AskTimeoutError):
                await reference.ask(Told(), Texts, timeout_s=0)
            worker.gate.set()
            await waiting
            letters = await reference.ask(DeadLetterQuery(), DeadLetterReport, timeout_s=5)
            assert [letter.reason for letter in letters.recent] == ["deadline_exceeded"]

    run(scenario())


def test_a_message_that_is_told_cannot_be_asked(folder: Path) -> None:
    async def scenario() -> None:
        harness = RuntimeHarness(folder, Worker("worker"))
        async with harness.runtime:
            with pytest.raises(RemoteError, match="Tell is told, never asked"):
                await harness.reference("worker").ask(Tell("x"), Done, timeout_s=5)

    run(scenario())


def test_a_later_answer_does_not_hold_up_the_mailbox(folder: Path) -> None:
    async def scenario() -> None:
        worker = Worker("worker")
        harness = RuntimeHarness(folder, worker)
        async with harness.runtime:
            reference = harness.reference("worker")
            later = asyncio.create_task(reference.ask(Open(), Done, timeout_s=5))
            await worker.entered.wait()
            assert await ask(reference, "meanwhile") == "meanwhile"
            reference.tell(Tell("open"))
            assert await later == Done("later")

    run(scenario())


def test_a_handler_sees_who_sent_the_message(folder: Path) -> None:
    async def scenario() -> None:
        worker = Worker("worker")
        harness = RuntimeHarness(folder, worker)
        other = Outbox("other", 42)
        async with harness.runtime:
            address = harness.address_book.address("worker")
            fenced, unfenced = other.reference("worker", address), harness.reference("worker")
            later = asyncio.create_task(fenced.ask(AskSenderLater(), SentBy, timeout_s=5))
            await worker.entered.wait()
            assert await unfenced.ask(AskSender(), SentBy, timeout_s=5) == SentBy("client", 0)
            assert await fenced.ask(AskSender(), SentBy, timeout_s=5) == SentBy("other", 42)
            unfenced.tell(Tell("open"))
            assert await later == SentBy("other", 42)  # the sender of the ask that was deferred, not of the last one
        with pytest.raises(LookupError):
            _ = worker.sender
        other.close()

    run(scenario())


def test_a_later_answer_may_refuse(folder: Path) -> None:
    async def scenario() -> None:
        harness = RuntimeHarness(folder, Worker("worker"))
        async with harness.runtime:
            reference = harness.reference("worker")
            reference.tell(Tell("refuse later"))
            reference.tell(Tell("open"))
            with pytest.raises(RemoteError, match="late: no"):
                await reference.ask(Open(), Done, timeout_s=5)

    run(scenario())


def test_a_later_answer_may_crash(folder: Path) -> None:
    async def scenario() -> None:
        async def use(reference: Reference) -> None:
            reference.tell(Tell("crash later"))
            reference.tell(Tell("open"))
            assert (await failure_of(reference, Open())).code == "handler_failed"

        assert "KeyError" in str(await crash_of(RuntimeHarness(folder, Worker("worker")), use))

    run(scenario())


def test_log_lines_of_a_handler_name_the_request(folder: Path) -> None:
    async def scenario() -> None:
        harness = RuntimeHarness(folder, Worker("worker"))
        async with harness.runtime:
            reference = harness.reference("worker")
            assert "'request_id': 'r1'" in await ask(reference, "context")

    run(scenario())
