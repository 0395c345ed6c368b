"""POST /v1/images/generations: pictures, and with `Prefer: respond-async` the place where they will be."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from triptych.api.artifacts import read_file
from triptych.api.encoding import JSONResponse
from triptych.api.errors import refused
from triptych.api.fields import MediaRequest, own_fields, parse
from triptych.api.forms import read_fields
from triptych.api.head import Head
from triptych.api.links import artifact_url, request_url
from triptych.api.names import Names
from triptych.api.requests import request_object
from triptych.api.submission import check_done, idempotency_key, submit, wait
from triptych.roles.messages.requests import QueryRequest, RequestView
from triptych.roles.messages.work import MAX_SEED, Input, Output


class ImageRequest(MediaRequest, frozen=True, kw_only=True):
    """The body."""

    n: Annotated[int, Meta(ge=1, le=10)] = 1
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp", "gif", "mp4", "zip", "wav"] | None = None
    """What suits the medium where it is not given."""
    output_compression: Annotated[int, Meta(ge=0, le=100)] | None = None
    """Of jpeg and webp: 100 is the best and largest."""


class Image(msgspec.Struct, omit_defaults=True):
    """One picture of the answer."""

    seed: int
    b64_json: bytes | None = None
    url: str | None = None
    nsfw_content_detected: bool | None = None
    """True: the safety checker of the model has made the image black; left out where the model has none."""


class ImagesResponse(msgspec.Struct):
    """OpenAI's answer, with the id of the request."""

    created: int
    """Unix seconds."""
    id: str
    data: list[Image]


class Generations(HTTPEndpoint):
    """Make pictures, and wait for them."""

    async def post(self, request: Request) -> Response:
        """Submit, wait, answer; a client that hangs up cancels, unless it holds a key to ask again with."""
        return await make(request, *await read(request))


async def read(request: Request) -> tuple[ImageRequest, dict[str, Input], Names]:
    """Read and check the body; raises ApiError."""
    fields = await read_fields(request, own_fields(ImageRequest))
    wanted, inputs = parse(fields, ImageRequest)
    if isinstance(wanted.seed, tuple):
        n = len(wanted.seed) if fields.values.get("n") is None else wanted.n
        if n != len(wanted.seed):
            raise refused("seed", f"must be as many as n, {n}, where it is a list, and has {len(wanted.seed)}")
        wanted = msgspec.structs.replace(wanted, n=n)
    elif wanted.seed is not None and wanted.seed + wanted.n - 1 > MAX_SEED:
        raise refused("seed", f"is too large: that of the last picture, seed + n - 1, is over {MAX_SEED}")
    if wanted.output_compression not in (None, 100) and wanted.output_format not in ("jpeg", "webp"):
        raise refused("output_compression", "must be 100 or left out unless output_format is jpeg or webp")
    return wanted, inputs, fields.names


async def make(request: Request, wanted: ImageRequest, inputs: dict[str, Input], names: Names) -> Response:
    """Submit, wait, answer."""
    quality = wanted.output_compression if wanted.output_format in ("jpeg", "webp") else None
    output = Output(wanted.output_format or "", quality=0 if quality is None else max(1, quality))
    request_id = await submit(request, inputs, names, model=wanted.model, seed=wanted.seed, n=wanted.n, output=output)
    if prefers_async(request):
        return await accepted(request, request_id)
    view = await wait(request, request_id, cancels=not idempotency_key(request))
    return await respond(request, wanted, view)


def prefers_async(request: Request) -> bool:
    """Whether the client would rather be told where to look than wait: RFC 7240, section 4.1."""
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return "respond-async" in (preference.partition(";")[0].strip().lower() for preference in preferences)


async def accepted(request: Request, request_id: str) -> Response:
    """Answer 202, with the request as it is now and the place where it can be followed."""
    head: Head = request.app.state.head
    view = await head.ask(QueryRequest(request_id, request.state.owner), RequestView)
    headers = {
        "Location": request_url(request, request_id),
        "Preference-Applied": "respond-async",
        "X-Request-Id": request_id,
    }
    return JSONResponse(request_object(request, view), status_code=202, headers=headers)


async def respond(request: Request, wanted: ImageRequest, view: RequestView) -> Response:
    """Make OpenAI's answer, with the seed of each picture beside it."""
    check_done(view)
    images = []
    for unit in sorted(view.units, key=lambda unit: unit.index):
        if unit.artifact is None:
            raise RuntimeError(f"{view.request_id} is {view.state}, but picture {unit.index} has no artifact")
        image = Image(unit.seed, nsfw_content_detected=unit.artifact.nsfw_content_detected)
        if wanted.response_format == "url":
            image.url = artifact_url(request, unit.artifact.name)
        else:
            image.b64_json = await read_file(request, unit.artifact.name)
        images.append(image)
    content = ImagesResponse(int(view.finished_at or time.time()), view.request_id, images)
    return JSONResponse(content, headers={"X-Request-Id": view.request_id})
