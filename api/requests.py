"""Requests: submit one, wait for it, and GET and DELETE /v1/requests/{id}."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
from collections.abc import Callable
from functools import partial
from typing import Final

import msgspec

from triptych.api.client import summarize_causes
from triptych.api.errors import CLIENT_CLOSED_REQUEST, ApiError, field_error, not_found
from triptych.api.media_request import MediaRequest, ParsedRequest
from triptych.api.operations import operation
from triptych.api.responses import JSONResponse, to_builtins
from triptych.api.services import ApiRequest
from triptych.api.urls import artifact_url
from triptych.api.webhook_targets import WebhookTargetError, check_webhook_url
from triptych.bus import AskTimeoutError, UnreachableError
from triptych.roles.head.job import State
from triptych.roles.messages.common import Images, Input, Output, Tensors, plain_value
from triptych.roles.messages.requests import RequestAccepted, RequestRejected, RequestView, SubmitRequest

WAIT_MARGIN_S: Final = 15.0
"""The head times requests out by itself; this much later the wait for it ends too."""
IDEMPOTENCY_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_UNSUCCESSFUL: Final = {
    State.CANCELLED: (409, "cancelled", "the request was cancelled"),
    State.FAILED: (500, "failed", "the request failed"),
    State.TIMED_OUT: (504, "timed_out", "the request took too long"),
}


class Deleted(msgspec.Struct):
    """The answer once a request or a video is removed."""

    id: str
    object: str
    """What it was, and `.deleted`."""
    deleted: bool = True


@operation({200: "Request"}, (404, 503))
async def get_request(request: ApiRequest) -> JSONResponse:
    """Show a request: state, history, attempts, causes, artifacts."""
    view = await request.state["services"].head.query(request.path_params["request_id"], request.state["owner"])
    return JSONResponse(request_object(request, view))


@operation({200: "RequestOrDeleted"}, (404, 503))
async def delete_request(request: ApiRequest) -> JSONResponse:
    """Cancel a request; remove one that has ended, its prompt and its files."""
    head, owner, id_ = request.state["services"].head, request.state["owner"], request.path_params["request_id"]
    view = await head.query(id_, owner)
    if not view.terminal:
        return JSONResponse(request_object(request, await head.cancel(id_, owner)))
    if not await head.delete(id_, owner):
        raise not_found(f"there is no request {id_}")
    return JSONResponse(Deleted(id_, "request.deleted"))


def request_object(request: ApiRequest, view: RequestView) -> dict[str, object]:
    """Show the view by field name, its artifacts with their URLs."""
    return show_request(view, partial(artifact_url, request))


def show_request(view: RequestView, file_url: Callable[[str], str]) -> dict[str, object]:
    """Show the view by field name; `file_url` makes the URL of an artifact of its name."""
    apart = ("request_id", "inputs", "units")
    fields = {name: to_builtins(getattr(view, name)) for name in view.__struct_fields__ if name not in apart}
    inputs = {name: input_view(value) for name, value in view.inputs.items()}
    units = []
    for job in view.units:
        row = to_builtins(job)
        if job.artifact is not None:
            row["artifact"]["url"] = file_url(job.artifact.name)
        for preview in row["previews"]:
            preview["artifact"]["url"] = file_url(preview["artifact"]["name"])
        units.append(row)
    return {"id": view.request_id, "object": "request", **fields, "inputs": inputs, "units": units}


def input_view(value: Input) -> object:
    """Show an input: images by name and size, numbers as a list."""
    match value:
        case Images(files):
            return [{"name": file.name, "bytes": file.nbytes} for file in files]
        case Tensors(file, names):
            return {"name": file.name, "bytes": file.nbytes, "tensors": list(names)}
        case _:
            return plain_value(value)


async def submit(
    request: ApiRequest, parsed: ParsedRequest[MediaRequest], *, n: int, output: Output, request_id: str = ""
) -> str:
    """Have the head accept a request; returns the id that it has there.

    Args:
        request: Of the client.
        parsed: What it asks for.
        n: How many images or videos.
        output: How each is written.
        request_id: The id that it is to have; sent again, it is the same request. By default a new one.

    Raises as `submit_and_view`.
    """
    return (await _submit(request, parsed, n=n, output=output, request_id=request_id)).request_id


async def submit_and_view(
    request: ApiRequest, parsed: ParsedRequest[MediaRequest], *, n: int, output: Output, remixed_from: str = ""
) -> RequestView:
    """Have the head accept a request; returns it as it is now.

    Args:
        request: Of the client.
        parsed: What it asks for.
        n: How many images or videos.
        output: How each is written.
        remixed_from: Id of the request that has the same inputs but for the prompt, if any.

    Raises:
        ApiError: The head refuses it, its priority is higher than the key allows (403), or its webhook is not called.
    """
    answer = await _submit(request, parsed, n=n, output=output, remixed_from=remixed_from, wants_view=True)
    if answer.view is None:
        raise RuntimeError(f"the head has accepted {answer.request_id} and shows no view of it")
    return answer.view


async def _submit(
    request: ApiRequest,
    parsed: ParsedRequest[MediaRequest],
    *,
    n: int,
    output: Output,
    request_id: str = "",
    remixed_from: str = "",
    wants_view: bool = False,
) -> RequestAccepted:
    head, state = request.state["services"].head, request.state
    key = idempotency_key(request) or request_id
    wanted = parsed.fields.priority
    priority = min(0, state["max_priority"]) if wanted is None else wanted
    if priority > state["max_priority"]:
        predicate = f"must be at most {state['max_priority']} for the key of {state['owner']}"
        raise field_error("priority", predicate, status=403, code="priority_not_allowed")
    if parsed.fields.webhook_url:
        check_webhook(request, parsed.fields.webhook_url)
    message = SubmitRequest(
        request_id=request_id or state["request_id"],
        inputs=parsed.inputs,
        seed=choose_seed(parsed.fields.seed, key),
        n=n,
        output=output,
        # Without one from the client, its own id is the key: a submission that the head's restart left
        # unanswered is sent again, and must not make a second request.
        idempotency_key=key or state["request_id"],
        owner=state["owner"],
        model=parsed.fields.model or "",
        priority=priority,
        deadline_s=parsed.fields.deadline_s or 0.0,
        partial_images=parsed.fields.partial_images or 0,
        remixed_from=remixed_from,
        wants_view=wants_view,
        webhook_url=parsed.fields.webhook_url or "",
    )
    try:
        answer = await head.submit(message)
    except (AskTimeoutError, UnreachableError):
        if not key:  # the head may have it all the same, and nobody can ask for it any more
            head.cancel_later(message.request_id, "the client was told that it was not accepted")
        raise
    if isinstance(answer, RequestRejected):
        raise parsed.names.rejected(answer)
    return answer


def check_webhook(request: ApiRequest, url: str) -> None:
    """Raise ApiError 422 unless a URL may be called, with a signature that its client can check."""
    services, owner = request.state["services"], request.state["owner"]
    try:
        check_webhook_url(url, services.topology.webhooks.hosts)
    except WebhookTargetError as error:
        raise field_error("webhook_url", str(error)) from None
    if not services.webhook_keys.of(owner):
        raise field_error(
            "webhook_url",
            f"cannot be called: [webhooks] keys_file has no secret for {owner or 'clients without a key'}",
        )


def choose_seed(wanted: int | tuple[int, ...] | None, idempotency_key: str) -> int | tuple[int, ...]:
    """Return the seed or seeds asked for; else 32 random bits, the same ones each time that a key is sent."""
    if wanted is not None:
        return wanted
    if idempotency_key:
        return int.from_bytes(hashlib.blake2s(idempotency_key.encode(), digest_size=4).digest())
    return secrets.randbits(32)


def idempotency_key(request: ApiRequest) -> str:
    """Return the Idempotency-Key header, empty if there is none."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return ""
    if not IDEMPOTENCY_KEY.fullmatch(key):  # an empty one, too: who sends it means to retry, and could not
        raise ApiError(400, "Idempotency-Key takes 1 to 255 visible ASCII characters", code="invalid_header")
    return key


async def wait(request: ApiRequest, request_id: str, *, cancels: bool) -> RequestView:
    """Wait for the terminal view; raises ApiError 499 (client gone), 503 (server stops), 504 (time is up).

    Args:
        request: Of the client that waits.
        request_id: What it waits for.
        cancels: Whether the request is cancelled when the client hangs up.
    """
    services, owner = request.state["services"], request.state["owner"]
    within_s = services.topology.head.request_timeout_s + WAIT_MARGIN_S
    terminal = asyncio.ensure_future(services.head.wait(request_id, within_s, owner))
    disconnected = asyncio.ensure_future(wait_for_disconnect(request))
    stopping = asyncio.ensure_future(services.stopping.wait())
    try:
        await asyncio.wait({terminal, disconnected, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if terminal.done():
            view = terminal.result()
        elif disconnected.done():
            if cancels:
                await services.head.cancel(request_id, owner, "the client hung up")
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client hung up", code="client_closed_request")
        else:
            raise stopping_error(request_id)
    finally:
        for task in (terminal, disconnected, stopping):
            task.cancel()
    if view is None:
        message = f"no answer within {within_s:.0f} s; ask GET /v1/requests/{request_id}"
        raise with_request_id(request_id, ApiError(504, message, code="timed_out"))
    return view


def stopping_error(request_id: str) -> ApiError:
    """Make a 503 for who waits for a request while the server stops."""
    message = f"the server is stopping; the request goes on: ask GET /v1/requests/{request_id}"
    return with_request_id(request_id, ApiError(503, message, code="stopping", retry_after_s=1.0))


async def wait_for_disconnect(request: ApiRequest) -> None:
    """Return when the client closes the connection, or just its sending side, which looks the same from here.

    The body has been read before.
    """
    while (await request.receive())["type"] != "http.disconnect":
        pass


def with_request_id(request_id: str, error: ApiError) -> ApiError:
    """Set the X-Request-Id of an error to the head's id of the request that it is about."""
    error.headers["X-Request-Id"] = request_id
    return error


def failure_reason(view: RequestView) -> str:
    """Say why a request failed, in one line; "" where nothing is known."""
    return summarize_causes(
        text
        for job in view.units
        for text in (*job.causes, *(move.reason for move in job.history if move.state == State.TIMED_OUT))
    )


def raise_unless_done(view: RequestView) -> None:
    """Raise ApiError unless every image is there: 409 cancelled, 422 or 500 failed, 504 timed out."""
    text = failure_reason(view)
    if view.state == State.FAILED and all(job.at_fault for job in view.units if job.state == State.FAILED):
        message = f"the request cannot be served as it is: {text}"
        raise with_request_id(view.request_id, ApiError(422, message, code="invalid_value"))
    if unsuccessful := _UNSUCCESSFUL.get(State(view.state)):
        status, code, message = unsuccessful
        raise with_request_id(view.request_id, ApiError(status, f"{message}: {text}" if text else message, code=code))
