"""From a request that has been read to one that the head has accepted, and the wait for its end."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets

from starlette.requests import Request

from triptych.api.client import summarize_causes
from triptych.api.errors import CLIENT_CLOSED_REQUEST, ApiError
from triptych.api.field_names import FieldNames
from triptych.api.head_client import HeadClient
from triptych.bus import AskTimeoutError, UnreachableError
from triptych.roles.messages.common import Input, Output
from triptych.roles.messages.requests import (
    CancelRequest,
    RequestAccepted,
    RequestRejected,
    RequestView,
    SubmitRequest,
)

WAIT_MARGIN_S = 15.0
"""The head times requests out by itself; this much later the wait for it ends too."""

IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,255}")


async def submit(
    request: Request,
    inputs: dict[str, Input],
    names: FieldNames,
    *,
    model: str | None,
    seed: int | tuple[int, ...] | None,
    n: int,
    output: Output,
) -> str:
    """Have the head accept a request; returns the id that it has there. Raises ApiError with the head's refusal."""
    head: HeadClient = request.app.state.head
    key = idempotency_key(request)
    message = SubmitRequest(
        request_id=request.state.request_id,
        inputs=inputs,
        seed=choose_seed(seed, key),
        n=n,
        output=output,
        # Without one from the client, its own id is the key: a submission that the head's restart left
        # unanswered is sent again, and must not make a second request.
        idempotency_key=key or request.state.request_id,
        owner=request.state.owner,
        model=model or "",
    )
    try:
        answer: RequestAccepted | RequestRejected = await head.ask(message, RequestAccepted, RequestRejected)
    except (AskTimeoutError, UnreachableError):
        if not key:  # the head may have it all the same, and nobody can ask for it any more
            head.cancel(message.request_id, "the client was told that it was not accepted")
        raise
    if isinstance(answer, RequestRejected):
        raise names.rejected(answer)
    return answer.request_id


def choose_seed(wanted: int | tuple[int, ...] | None, idempotency_key: str) -> int | tuple[int, ...]:
    """Return the seed or seeds asked for; else 32 random bits, the same ones each time that a key is sent."""
    if wanted is not None:
        return wanted
    if idempotency_key:
        return int.from_bytes(hashlib.blake2s(idempotency_key.encode(), digest_size=4).digest())
    return secrets.randbits(32)


def idempotency_key(request: Request) -> str:
    """Return the Idempotency-Key header, empty if there is none."""
    key = request.headers.get("idempotency-key", "")
    if key and not IDEMPOTENCY_KEY.fullmatch(key):
        raise ApiError(400, "Idempotency-Key takes 1 to 255 visible ASCII characters", code="invalid_header")
    return key


async def wait(request: Request, request_id: str, *, cancels: bool) -> RequestView:
    """Wait for the terminal view; raises ApiError 499 (client gone), 503 (server stops), 504 (time is up)."""
    head: HeadClient = request.app.state.head
    within_s = request.app.state.topology.head.request_timeout_s + WAIT_MARGIN_S
    terminal = asyncio.ensure_future(head.wait(request_id, within_s, request.state.owner))
    disconnected = asyncio.ensure_future(wait_for_disconnect(request))
    stopping = asyncio.ensure_future(request.app.state.stopping.wait())
    try:
        await asyncio.wait({terminal, disconnected, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if terminal.done():
            view = terminal.result()
        elif disconnected.done():
            if cancels:
                await head.ask(CancelRequest(request_id, "the client hung up", request.state.owner), RequestView)
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client hung up", code="client_closed_request")
        else:
            message = f"the server is stopping; the request goes on: ask GET /v1/requests/{request_id}"
            raise with_request_id(request_id, ApiError(503, message, code="stopping", retry_after_s=1.0))
    finally:
        for task in (terminal, disconnected, stopping):
            task.cancel()
    if view is None:
        message = f"no answer within {within_s:.0f} s; ask GET /v1/requests/{request_id}"
        raise with_request_id(request_id, ApiError(504, message, code="timed_out"))
    return view


async def wait_for_disconnect(request: Request) -> None:
    """Return when the client closes the connection, or just its sending side, which looks the same from here.

    The body has been read before.
    """
    while (await request.receive())["type"] != "http.disconnect":
        pass


def with_request_id(request_id: str, error: ApiError) -> ApiError:
    """Put the error of a request that the head knows under the head's id for it."""
    error.headers["X-Request-Id"] = request_id
    return error


def failure_reason(view: RequestView) -> str:
    """Say why a request came to no good end, in one line; empty where nothing is known."""
    return summarize_causes(
        text
        for job in view.units
        for text in (*job.causes, *(move.reason for move in job.history if move.state == "TIMED_OUT"))
    )


def raise_unless_done(view: RequestView) -> None:
    """Raise ApiError unless every image is there: 409 cancelled, 422 or 500 with_request_id, 504 timed out."""
    text = failure_reason(view)
    if view.state == "FAILED" and all(job.at_fault for job in view.units if job.state == "FAILED"):
        message = f"the request cannot be served as it is: {text}"
        raise with_request_id(view.request_id, ApiError(422, message, code="invalid_value"))
    errors = {
        "CANCELLED": (409, "cancelled", "the request was cancelled"),
        "FAILED": (500, "failed", "the request failed"),
        "TIMED_OUT": (504, "timed_out", "the request took too long"),
    }
    if view.state in errors:
        status, code, message = errors[view.state]
        raise with_request_id(view.request_id, ApiError(status, f"{message}: {text}" if text else message, code=code))
