"""Between the API's process, which sends webhooks, and the head, which keeps them until they have arrived."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from triptych.bus import Message
from triptych.roles.messages.common import Name, Natural, Seconds, Value

MAX_URL = 2048
WebhookUrl = Annotated[str, Meta(max_length=MAX_URL)]
Outcome = Literal["delivered", "failed", "refused"]
"""What came of an attempt; after `refused` there is no further one."""


class DueWebhook(Value):
    """A webhook to be sent now."""

    request_id: Name
    owner: Name
    """Name of the client's API key; "" without keys."""
    attempts: Natural
    """Those that came before."""


class TakeWebhooks(Message):
    """Asks for the WebhooksDue, at the latest after `timeout_s`."""

    sending: tuple[Name, ...]
    """Ids of requests whose webhooks are being sent, which are left out."""
    limit: Annotated[int, Meta(ge=1, le=1000)]
    timeout_s: Seconds


class WebhooksDue(Message):
    """The webhooks that are due; empty when the time is up, and when one may be due whose attempt has ended since."""

    webhooks: tuple[DueWebhook, ...] = msgspec.field(default=())


class WebhookTried(Message):
    """An attempt has ended. Asks for WebhookRecorded; may be sent again."""

    request_id: Name
    attempts: Natural
    """`DueWebhook.attempts`, so that the same attempt counts once."""
    outcome: Outcome


class WebhookRecorded(Message):
    """What follows from it is written."""

    retry_s: float | None
    """Seconds until the next attempt; None if there is none."""
