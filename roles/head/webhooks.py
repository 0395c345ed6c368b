"""Webhooks that have not arrived: which are due, when a failed one is tried again, and when it is given up.

The journal has them, written with the request that they are of, so that they survive a restart of the head; what is
being sent is known to the API's process alone, and lost with it. So a webhook is sent at least once.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from triptych.actors.topology import WebhooksSection
from triptych.backoff import backoff_s
from triptych.roles.head.journal import Journal, PendingWebhook
from triptych.roles.messages.webhooks import DueWebhook, TakeWebhooks, WebhookRecorded, WebhooksDue, WebhookTried
from triptych.roles.metrics import WEBHOOKS

LONGEST_PAUSE_S: Final = 3600.0


def next_attempt_at(
    webhook: PendingWebhook, settings: WebhooksSection, now: float, jitter: float | None = None
) -> float | None:
    """Return when a webhook whose attempt has failed `now` is due again (unix seconds); None if it is given up.

    Args:
        webhook: As it was before this attempt.
        settings: Of the topology.
        now: Unix seconds.
        jitter: As in `backoff_s`.
    """
    longest_s = max(settings.retry_s, LONGEST_PAUSE_S)
    at = now + backoff_s(webhook.attempts, first_s=settings.retry_s, longest_s=longest_s, jitter=jitter)
    return at if at <= webhook.ended_at + settings.give_up_s else None


class WebhookQueue:
    """The webhooks of a journal, for the API's process, which sends them.

    Args:
        settings: Of the topology.
        journal: Has them.
    """

    def __init__(self, settings: WebhooksSection, journal: Journal) -> None:
        self._settings = settings
        self._journal = journal
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Have `take` look again: there may be others that are due."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def take(self, message: TakeWebhooks) -> WebhooksDue:
        """Return the webhooks that are due and are not being sent, as soon as there are some.

        Raises:
            JournalError: The journal cannot be read.
        """
        changed, until = self._changed, time.monotonic() + message.timeout_s
        while True:
            waiting = self._journal.webhooks(message.limit + len(message.sending))
            waiting = [each for each in waiting if each.request_id not in message.sending][: message.limit]
            now, left_s = time.time(), until - time.monotonic()
            due = tuple(
                DueWebhook(each.request_id, each.owner, each.attempts) for each in waiting if each.next_at <= now
            )
            if due or left_s <= 0 or changed.is_set():  # what is being sent may have changed as well
                return WebhooksDue(due)
            try:
                async with asyncio.timeout(min([left_s, *(each.next_at - now for each in waiting)])):
                    await changed.wait()
            except TimeoutError:  # the next one is due, or the time is up
                pass

    def tried(self, message: WebhookTried) -> WebhookRecorded:
        """Record an attempt.

        Raises:
            JournalError: The journal cannot be read or written.
        """
        webhook, now = self._journal.webhook(message.request_id), time.time()
        if webhook is None:
            return WebhookRecorded(None)
        if webhook.attempts != message.attempts:  # recorded before, and the answer was lost
            return WebhookRecorded(max(0.0, webhook.next_at - now))
        at = next_attempt_at(webhook, self._settings, now) if message.outcome == "failed" else None
        if at is None:
            self._journal.forget_webhook(webhook.request_id)
        else:
            self._journal.retry_webhook(webhook.request_id, webhook.attempts + 1, at)
        WEBHOOKS.labels("delivered" if message.outcome == "delivered" else "given_up" if at is None else "failed").inc()
        self.notify()
        return WebhookRecorded(None if at is None else at - now)
