"""Client of the head: its questions as methods, which outlive its restarts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import TypeVar

import structlog

from triptych.bus import AskTimeoutError, BusError, MailboxFullError, Message, Reference, RemoteError, UnreachableError
from triptych.roles.messages.common import MAX_NAME
from triptych.roles.messages.requests import (
    CancelRequest,
    ClusterQuery,
    ClusterView,
    DeleteRequest,
    DescribeModel,
    ListModels,
    ListRequests,
    ModelDescription,
    ModelDescriptions,
    QueryRequest,
    RequestAccepted,
    RequestDeleted,
    RequestList,
    RequestRejected,
    RequestView,
    SubmitRequest,
    WaitRequest,
)
from triptych.roles.messages.webhooks import (
    DueWebhook,
    Outcome,
    TakeWebhooks,
    WebhookRecorded,
    WebhooksDue,
    WebhookTried,
)

R = TypeVar("R", bound=Message)
log = structlog.stdlib.get_logger("api")

ANSWER_TIMEOUT_S = 5.0
"""How long a client waits for an answer that costs the head nothing."""
LONG_POLL_S = 20.0
"""One long poll; short, for the case of a head that is gone while its connection seems up."""
POLL_GRACE_S = 5.0
ASK_AGAIN_S = 0.1


class HeadClient:
    """Client of the head. Every message sent through here may arrive twice: the head knows a request by its id.

    Each method raises what `Reference.ask` raises; UnreachableError only once `patience_s` has passed. `owner` is the
    name of the API key: only its requests are found, with "" anybody's. A request that is not found is a RemoteError
    with the code "not_found".
    """

    def __init__(self, reference: Reference, patience_s: float = ANSWER_TIMEOUT_S) -> None:
        self.reference = reference
        self.patience_s = patience_s
        self._descriptions: dict[str, ModelDescription] = {}
        """By the name that was asked for; only of models that an instance has loaded."""

    async def submit(self, message: SubmitRequest) -> RequestAccepted | RequestRejected:
        """Have the head accept a request."""
        answer: RequestAccepted | RequestRejected = await self._ask(message, RequestAccepted, RequestRejected)
        kept = self._descriptions.get(message.model)
        if kept is not None and kept.version != answer.description_version:
            del self._descriptions[message.model]
        return answer

    async def query(self, request_id: str, owner: str) -> RequestView:
        """Return a request as it is now."""
        if len(request_id) > MAX_NAME:  # as the bus would refuse it
            raise RemoteError("not_found", f"there is no request {request_id}: an id is at most {MAX_NAME} characters")
        return await self._ask(QueryRequest(request_id, owner), RequestView)

    async def cancel(self, request_id: str, owner: str, reason: str = "cancelled by the client") -> RequestView:
        """Cancel a request."""
        return await self._ask(CancelRequest(request_id, reason, owner), RequestView)

    def cancel_later(self, request_id: str, reason: str) -> None:
        """Cancel a request without waiting for an answer; one that the head does not have is ignored."""
        try:
            self.reference.tell(CancelRequest(request_id, reason))
        except BusError as error:
            log.warning("cancel not sent, the request goes on", request_id=request_id, error=str(error))

    async def delete(self, request_id: str, owner: str) -> bool:
        """Remove a request with its prompt and its files; returns whether there was one."""
        return (await self._ask(DeleteRequest(request_id, owner), RequestDeleted)).existed

    async def list_requests(self, message: ListRequests) -> RequestList:
        """List ids of requests; raises RemoteError "not_found" where `after` is none of them."""
        return await self._ask(message, RequestList)

    async def models(self) -> tuple[ModelDescription, ...]:
        """Describe all models, in the order of the topology."""
        return (await self._ask(ListModels(), ModelDescriptions)).models

    async def describe(self, model: str) -> ModelDescription:
        """Describe a model as it is now, the first for ""; raises RemoteError "model_not_found"."""
        description = await self._ask(DescribeModel(model), ModelDescription)
        if description.parameters:
            self._descriptions[model] = description
        return description

    async def kept_description(self, model: str) -> ModelDescription:
        """Describe a model as `describe` did before, in all but its `state`; asks the head only the first time.

        It is kept until the answer to a request carries another version, or until `forget_descriptions`.
        """
        return self._descriptions.get(model) or await self.describe(model)

    def forget_descriptions(self) -> None:
        """Ask the head again for the next description."""
        self._descriptions.clear()

    async def cluster(self) -> ClusterView:
        """Return the jobs and instances of the cluster."""
        return await self._ask(ClusterQuery(), ClusterView)

    async def wait(self, request_id: str, within_s: float, owner: str = "") -> RequestView | None:
        """Wait until the request is terminal, None if that takes longer; a restarted head is asked again."""
        deadline = time.monotonic() + within_s
        while (remaining := deadline - time.monotonic()) > 0:
            view = await self._wait(WaitRequest(request_id, min(LONG_POLL_S, remaining), owner))
            if view is not None and view.terminal:
                return view
        return None

    async def watch(self, request_id: str, owner: str = "", revision: str = "") -> AsyncIterator[RequestView]:
        """Yield a request as it is, then at each change until it is terminal; a restarted head is asked again.

        Of changes that come faster than they are taken, the last one is yielded. Where none comes, the same view is
        yielded again each `LONG_POLL_S`, so that the caller can tell its client that it is still there. Only the view
        that is there at first, and that of the end, have inputs and runs.

        Args:
            request_id: The request, one that the head has accepted.
            owner: Who asks.
            revision: The revision that is known already: the first view is the first with another one.

        Raises:
            RemoteError: "not_found" once the request is deleted.
        """
        while (view := await self._poll(QueryRequest(request_id, owner), RequestView, 0.0)) is None:
            pass
        if view.revision != revision or view.terminal:
            yield view
        while not view.terminal:
            changed = await self._wait(WaitRequest(request_id, LONG_POLL_S, owner, view.revision))
            if changed is not None:
                view = changed
                yield view

    async def _wait(self, message: WaitRequest) -> RequestView | None:
        return await self._poll(message, RequestView, message.timeout_s)

    async def take_webhooks(self, sending: tuple[str, ...], limit: int) -> tuple[DueWebhook, ...]:
        """Wait for webhooks that are due, at most `limit` and none of `sending`; () after a while or without a head."""
        found = await self._poll(TakeWebhooks(sending, limit, LONG_POLL_S), WebhooksDue, LONG_POLL_S)
        return found.webhooks if found else ()

    async def webhook_tried(self, webhook: DueWebhook, outcome: Outcome) -> float | None:
        """Have the head record an attempt, and wait as long as it takes; returns the seconds until the next one."""
        message = WebhookTried(webhook.request_id, webhook.attempts, outcome)
        while (recorded := await self._poll(message, WebhookRecorded, 0.0)) is None:
            pass
        return recorded.retry_s

    async def _poll(self, message: Message, reply: type[R], timeout_s: float) -> R | None:
        """Ask once, for an answer within `timeout_s`; returns None where the head could not answer, but will."""
        try:
            return await self.reference.ask(message, reply, timeout_s=timeout_s + POLL_GRACE_S)
        except (AskTimeoutError, MailboxFullError, UnreachableError):
            pass  # the head restarts, or has too much to do
        except RemoteError as failure:
            if failure.code not in ("stopping", "deadline_exceeded", "unavailable"):
                raise
        await asyncio.sleep(ASK_AGAIN_S)
        return None

    async def _ask(self, message: Message, *replies: type[R]) -> R:
        deadline = time.monotonic() + self.patience_s
        while True:
            remaining = deadline - time.monotonic()
            try:
                return await self.reference.ask(message, *replies, timeout_s=max(remaining, ASK_AGAIN_S))
            except UnreachableError:
                if remaining < 2 * ASK_AGAIN_S:
                    raise
                await asyncio.sleep(ASK_AGAIN_S)
