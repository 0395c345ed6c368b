"""Webhooks wait in the journal until they have arrived or are given up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.roles.head.test_journal import a_request
from triptych.actors.topology import WebhooksSection
from triptych.roles.head.journal import Journal, PendingWebhook
from triptych.roles.head.webhooks import LONGEST_PAUSE_S, WebhookQueue, next_attempt_at
from triptych.roles.messages.webhooks import DueWebhook, TakeWebhooks, WebhooksDue, WebhookTried

SETTINGS = WebhooksSection(retry_s=4.0, give_up_s=1e10)
NOW = 1_000_000.0


def test_the_pauses_double_up_to_an_hour_and_the_end_is_a_time_after_the_request() -> None:
    def pause(attempts: int, give_up_s: float = 1e9) -> float | None:
        settings = WebhooksSection(retry_s=4.0, give_up_s=give_up_s)
        at = next_attempt_at(PendingWebhook("r", "", attempts, NOW - 100, 0.0), settings, NOW, jitter=0.0)
        return None if at is None else at - NOW

    assert [pause(k) for k in (0, 1, 2, 30)] == [4.0, 8.0, 16.0, LONGEST_PAUSE_S]
    assert [pause(0, 104.0), pause(0, 103.0)] == [4.0, None]


class Queue:
    """A queue on a journal."""

    def __init__(self, path: Path, settings: WebhooksSection = SETTINGS) -> None:
        self.journal = Journal(path)
        self.queue = WebhookQueue(settings, self.journal)

    def accept(self, id_: str, *, ended_at: float = 0.0, url: str = "https://a/", owner: str = "") -> None:
        request = a_request(id_)
        request.webhook_url, request.owner = url, owner
        self.journal.accept(request)
        if ended_at:
            self.end(id_, ended_at)

    def end(self, id_: str, at: float = NOW) -> None:
        request = self.journal.find(id_)
        assert request
        request.finished_at = at
        self.journal.save([request], [])
        self.queue.notify()

    async def take(self, *sending: str, limit: int = 9, timeout_s: float = 0.0) -> list[str]:
        answer = await self.queue.take(TakeWebhooks(sending, limit, timeout_s))
        return [webhook.request_id for webhook in answer.webhooks]

    def tried(self, id_: str, outcome: str, attempts: int = 0) -> float | None:
        return self.queue.tried(WebhookTried(id_, attempts, outcome)).retry_s  # type: ignore[arg-type]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_a_webhook_is_due_once_its_request_has_ended_until_it_has_arrived(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "j.sqlite")
    queue.accept("active")
    queue.accept("silent", ended_at=NOW, url="")
    queue.accept("a", ended_at=NOW, owner="alice")
    queue.accept("b", ended_at=NOW)
    answer = await queue.queue.take(TakeWebhooks((), 9, 0.0))
    assert answer == WebhooksDue((DueWebhook("a", "alice", 0), DueWebhook("b", "", 0)))
    assert await queue.take("a") == ["b"]
    assert await queue.take(limit=1) == ["a"]
    assert queue.tried("a", "delivered") is None
    assert await queue.take() == ["b"]
    queue.journal.delete("b")
    assert await queue.take() == []


@pytest.mark.anyio
async def test_who_waits_gets_what_ends_meanwhile(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "j.sqlite")
    queue.accept("a")
    waiting = asyncio.create_task(queue.take(timeout_s=60.0))
    await asyncio.sleep(0)
    assert not waiting.done()
    queue.end("a")
    assert await waiting == ["a"]


@pytest.mark.anyio
async def test_what_has_failed_waits_and_is_counted_once_also_over_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "j.sqlite"
    queue = Queue(path)
    queue.accept("a", ended_at=NOW)
    waiting = asyncio.create_task(queue.take("a", timeout_s=60.0))
    await asyncio.sleep(0)
    retry_s = queue.tried("a", "failed")
    assert await waiting == [], "its sender asks again, and no longer says that it is being sent"
    assert retry_s is not None
    assert 2.0 <= retry_s <= 4.0
    assert await queue.take() == []
    queue.journal.close()
    queue = Queue(path)  # the head has restarted, and its answer was lost
    again = queue.tried("a", "failed")
    assert again is not None
    assert again <= retry_s
    (pending,) = queue.journal.webhooks(9)
    assert (pending.attempts, pending.owner) == (1, "")
    queue.journal.retry_webhook("a", 1, 0.0)
    assert await queue.take() == ["a"]
    assert queue.tried("a", "refused", attempts=1) is None
    assert queue.journal.webhooks(9) == []


@pytest.mark.anyio
async def test_a_webhook_is_given_up_in_the_end(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "j.sqlite", WebhooksSection(retry_s=4.0, give_up_s=60.0))
    queue.accept("a", ended_at=NOW)  # long ago
    assert queue.tried("a", "failed") is None
    assert await queue.take() == []
