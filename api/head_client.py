"""The head, seen from HTTP: asks that outlive its restarts."""

from __future__ import annotations

import asyncio
import time
from typing import TypeVar

import structlog

from triptych.bus import AskTimeoutError, BusError, MailboxFullError, Message, Reference, RemoteError, UnreachableError
from triptych.roles.messages.requests import CancelRequest, RequestView, WaitRequest

R = TypeVar("R", bound=Message)
log = structlog.stdlib.get_logger("api")

ANSWER_TIMEOUT_S = 5.0
"""How long a client waits for an answer that costs the head nothing."""
LONG_POLL_S = 20.0
"""One long poll; short, for the case of a head that is gone while its connection seems up."""
POLL_GRACE_S = 5.0
RETRY_S = 0.1


class HeadClient:
    """Client of the head. Every message sent through here may arrive twice: the head knows a request by its id."""

    def __init__(self, reference: Reference, patience_s: float = ANSWER_TIMEOUT_S) -> None:
        self.reference = reference
        self.patience_s = patience_s

    async def ask(self, message: Message, *replies: type[R]) -> R:
        """Ask the head; retry while it is unreachable.

        Raises what `Reference.ask` raises; Unreachable only once `patience_s` has passed.
        """
        deadline = time.monotonic() + self.patience_s
        while True:
            remaining = deadline - time.monotonic()
            try:
                return await self.reference.ask(message, *replies, timeout_s=max(remaining, RETRY_S))
            except UnreachableError:
                if remaining < 2 * RETRY_S:
                    raise
                await asyncio.sleep(RETRY_S)

    def cancel(self, request_id: str, reason: str) -> None:
        """Have the head cancel a request when it can be reached, should there be such a request."""
        try:
            self.reference.tell(CancelRequest(request_id, reason))
        except BusError as error:
            log.warning("cancel not sent, the request goes on", request_id=request_id, error=str(error))

    async def wait(self, request_id: str, within_s: float, owner: str = "") -> RequestView | None:
        """Wait until the request is terminal, None if that takes longer; a restarted head is asked again."""
        deadline = time.monotonic() + within_s
        while (remaining := deadline - time.monotonic()) > 0:
            poll_s = min(LONG_POLL_S, remaining)
            try:
                view = await self.reference.ask(
                    WaitRequest(request_id, poll_s, owner), RequestView, timeout_s=poll_s + POLL_GRACE_S
                )
            except (AskTimeoutError, MailboxFullError, UnreachableError):
                await asyncio.sleep(RETRY_S)
            except RemoteError as failure:
                if failure.code not in ("stopping", "deadline_exceeded", "unavailable"):
                    raise
                await asyncio.sleep(RETRY_S)
            else:
                if view.terminal:
                    return view
        return None
