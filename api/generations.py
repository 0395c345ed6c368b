"""POST /v1/images/generations."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from api.artifacts import artifact_url
from api.body import read_json
from api.encoding import JSONResponse
from api.errors import CLIENT_CLOSED_REQUEST, ApiError, from_rejection, from_validation, invalid, not_found
from api.head import Head
from roles.artifacts import ArtifactStore
from roles.messages.requests import (
    CancelRequest,
    DescribeModel,
    ModelDescription,
    RequestAccepted,
    RequestRejected,
    RequestView,
    SubmitRequest,
)
from roles.messages.work import Input as PipelineInput
from roles.messages.work import Output

MAX_TEXT = 32_768
MAX_INPUTS = 64
MAX_SEED = 2**63 - 1
MARGIN_S = 15.0
"""The head times requests out by itself; this much later the wait for it ends too."""

Text: TypeAlias = Annotated[str, Meta(max_length=MAX_TEXT)]
Input: TypeAlias = Text | Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | float | bool | None
_SIZE = re.compile(r"(?P<width>[1-9][0-9]{0,4})x(?P<height>[1-9][0-9]{0,4})")
_KEY = re.compile(r"[\x21-\x7e]{1,255}")


class ImageRequest(msgspec.Struct, frozen=True):
    """The body: OpenAI's fields, then diffusers'; null is the same as not given.

    Any other field is taken for an input of the pipeline; the head refuses it if the pipeline has none of that name.
    """

    prompt: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)]
    n: Annotated[int, Meta(ge=1, le=10)] = 1
    size: str = "auto"
    """WIDTHxHEIGHT in pixels, or auto: the model's default."""
    model: str | None = None
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    user: str | None = None
    """Taken for compatibility, and not kept."""
    seed: Annotated[int, Meta(ge=0, le=MAX_SEED)] | None = None
    num_inference_steps: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None
    guidance_scale: float | None = None
    negative_prompt: Text | None = None


_INPUTS = ("prompt", "num_inference_steps", "guidance_scale", "negative_prompt")


class Image(msgspec.Struct, omit_defaults=True):
    """One picture of the answer."""

    seed: int
    b64_json: bytes | None = None
    url: str | None = None


def parse(body: dict[str, object]) -> tuple[ImageRequest, dict[str, PipelineInput]]:
    """Check types and shapes, gather the pipeline's inputs; raises ApiError 422 with the field at fault."""
    fields = ImageRequest.__struct_fields__
    given = {name: body[name] for name in fields if body.get(name) is not None}
    try:
        wanted = msgspec.convert(given, ImageRequest)
    except msgspec.ValidationError as error:
        raise from_validation(error) from None
    inputs: dict[str, PipelineInput] = {name: value for name in _INPUTS if (value := getattr(wanted, name)) is not None}
    for name in body.keys() - set(fields):
        try:
            inputs[name] = msgspec.convert(body[name], Input)
        except msgspec.ValidationError as error:
            raise invalid(name, f"{error}: an input of the pipeline is a string, number, bool or null") from None
    if len(inputs) > MAX_INPUTS:
        raise invalid("prompt", f"more than {MAX_INPUTS} inputs")
    if wanted.seed is not None and wanted.seed + wanted.n - 1 > MAX_SEED:
        raise invalid("seed", f"the last picture's seed, seed + n - 1, is over {MAX_SEED}")
    return wanted, inputs | parse_size(wanted.size, inputs)


def parse_size(size: str, inputs: dict[str, PipelineInput]) -> dict[str, PipelineInput]:
    """Return height and width in pixels, nothing for auto."""
    if size == "auto":
        return {}
    match = _SIZE.fullmatch(size)
    if match is None:
        raise invalid("size", "size is WIDTHxHEIGHT in pixels, as in 1024x1024, or auto")
    if "height" in inputs or "width" in inputs:
        raise invalid("size", "give size, or height and width, not both")
    return {"height": int(match["height"]), "width": int(match["width"])}


def choose_seed(wanted: int | None, idempotency_key: str) -> int:
    """Return the seed asked for; else 32 random bits, the same ones each time that a key is sent."""
    if wanted is not None:
        return wanted
    if idempotency_key:
        return int.from_bytes(hashlib.blake2s(idempotency_key.encode(), digest_size=4).digest())
    return secrets.randbits(32)


class Generations(HTTPEndpoint):
    """Make pictures, and wait for them."""

    async def post(self, request: Request) -> Response:
        """Submit, wait, answer; a client that hangs up cancels, unless it holds a key to ask again with."""
        wanted, inputs = parse(await read_json(request))
        head: Head = request.app.state.head
        if wanted.model is not None:
            await check_model(head, wanted.model)
        key = idempotency_key(request)
        submit = SubmitRequest(
            request_id=request.state.request_id,
            inputs=inputs,
            seed=choose_seed(wanted.seed, key),
            n=wanted.n,
            output=Output(wanted.output_format),
            # Without one from the client, its own id is the key: a submission that the head's restart left
            # unanswered is sent again, and must not make a second request.
            idempotency_key=key or request.state.request_id,
        )
        answer: RequestAccepted | RequestRejected = await head.ask(submit, RequestAccepted, RequestRejected)
        if isinstance(answer, RequestRejected):
            raise from_rejection(answer)
        view = await wait(request, head, answer.request_id, cancels=not key)
        return await respond(request, wanted, view)


async def check_model(head: Head, model: str) -> None:
    """Raise ApiError 404 unless this is the model being served."""
    description = await head.ask(DescribeModel(), ModelDescription)
    if model != description.name:
        raise not_found(f"the model {model!r} is not served here, {description.name!r} is", code="model_not_found")


def idempotency_key(request: Request) -> str:
    """Return the Idempotency-Key header, empty if there is none."""
    key = request.headers.get("idempotency-key", "")
    if key and not _KEY.fullmatch(key):
        raise ApiError(400, "Idempotency-Key takes 1 to 255 visible ASCII characters", code="invalid_header")
    return key


async def wait(request: Request, head: Head, request_id: str, *, cancels: bool) -> RequestView:
    """Wait for the terminal view; raises ApiError 499 (client gone), 503 (server stops), 504 (time is up)."""
    within_s = request.app.state.topology.head.request_timeout_s + MARGIN_S
    terminal = asyncio.ensure_future(head.wait(request_id, within_s))
    hung_up = asyncio.ensure_future(until_hung_up(request))
    stopping = asyncio.ensure_future(request.app.state.stopping.wait())
    try:
        await asyncio.wait({terminal, hung_up, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if terminal.done():
            view = terminal.result()
        elif hung_up.done():
            if cancels:
                await head.ask(CancelRequest(request_id, "the client hung up"), RequestView)
            raise ApiError(CLIENT_CLOSED_REQUEST, "the client hung up", code="client_closed_request")
        else:
            message = f"the server is stopping; the request goes on: ask GET /v1/requests/{request_id}"
            raise failed(request_id, ApiError(503, message, code="stopping", retry_after_s=1.0))
    finally:
        for task in (terminal, hung_up, stopping):
            task.cancel()
    if view is None:
        message = f"no answer within {within_s:.0f} s; ask GET /v1/requests/{request_id}"
        raise failed(request_id, ApiError(504, message, code="timed_out"))
    return view


async def until_hung_up(request: Request) -> None:
    """Return when the client closes the connection; the body has been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def failed(request_id: str, error: ApiError) -> ApiError:
    """Put the error of a request that the head knows under the head's id for it."""
    error.headers["X-Request-Id"] = request_id
    return error


def check_done(view: RequestView) -> None:
    """Raise ApiError unless every picture is there: 409 cancelled, 500 failed, 504 timed out."""
    causes = [cause for unit in view.units for cause in unit.causes]
    # The last line of a cause names the error; should there be a traceback above it, that is for the log.
    text = "; ".join(dict.fromkeys(cause.strip().splitlines()[-1] for cause in causes if cause.strip()))
    errors = {
        "CANCELLED": (409, "cancelled", "the request was cancelled"),
        "FAILED": (500, "failed", "the request failed"),
        "TIMED_OUT": (504, "timed_out", "the request took too long"),
    }
    if view.state in errors:
        status, code, message = errors[view.state]
        raise failed(view.request_id, ApiError(status, f"{message}: {text}" if text else message, code=code))


async def respond(request: Request, wanted: ImageRequest, view: RequestView) -> Response:
    """Make OpenAI's answer, with the seed of each picture beside it."""
    check_done(view)
    store: ArtifactStore = request.app.state.artifacts
    images = []
    for unit in sorted(view.units, key=lambda unit: unit.index):
        if unit.artifact is None:
            raise RuntimeError(f"{view.request_id} is {view.state}, but picture {unit.index} has no artifact")
        if wanted.response_format == "url":
            images.append(Image(unit.seed, url=artifact_url(request, unit.artifact.name)))
        else:
            images.append(Image(unit.seed, b64_json=await asyncio.to_thread(store.read, unit.artifact.name)))
    content = {"created": int(view.finished_at or time.time()), "id": view.request_id, "data": images}
    return JSONResponse(content, headers={"X-Request-Id": view.request_id})
