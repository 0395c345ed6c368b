"""POST /v1/images/generations: images, and with `Prefer: respond-async` the place where they will be."""

from __future__ import annotations

import time
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from triptych.api.artifacts import read_file
from triptych.api.body_fields import read_fields
from triptych.api.errors import field_error
from triptych.api.field_names import FieldNames
from triptych.api.head_client import HeadClient
from triptych.api.media_request import MediaRequest, parse_media_request, typed_fields
from triptych.api.requests import request_object
from triptych.api.responses import JSONResponse
from triptych.api.submission import idempotency_key, raise_unless_done, submit, wait
from triptych.api.urls import artifact_url, request_url
from triptych.roles.messages.common import MAX_SEED, Input, Output
from triptych.roles.messages.requests import QueryRequest, RequestView


class ImageRequest(MediaRequest, frozen=True, kw_only=True):
    """The body."""

    n: Annotated[int, Meta(ge=1, le=10)] = 1
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp", "gif", "mp4", "zip", "wav"] | None = None
    """What suits the medium where it is not given."""
    output_compression: Annotated[int, Meta(ge=0, le=100)] | None = None
    """Of jpeg and webp: 100 is the best and largest."""


class Image(msgspec.Struct, omit_defaults=True):
    """One image of the answer."""

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


class ImageGenerations(HTTPEndpoint):
    """Make images, and wait for them."""

    async def post(self, request: Request) -> Response:
        """Submit, wait, answer; a client that hangs up cancels, unless it holds a key to ask again with."""
        return await generate_images(request, *await read_image_request(request))


async def read_image_request(request: Request) -> tuple[ImageRequest, dict[str, Input], FieldNames]:
    """Read and check the body; raises ApiError."""
    fields = await read_fields(request, typed_fields(ImageRequest))
    wanted, inputs = parse_media_request(fields, ImageRequest)
    if isinstance(wanted.seed, tuple):
        n = len(wanted.seed) if fields.values.get("n") is None else wanted.n
        if n != len(wanted.seed):
            raise field_error("seed", f"must be as many as n, {n}, where it is a list, and has {len(wanted.seed)}")
        wanted = msgspec.structs.replace(wanted, n=n)
    elif wanted.seed is not None and wanted.seed + wanted.n - 1 > MAX_SEED:
        raise field_error("seed", f"is too large: that of the last image, seed + n - 1, is over {MAX_SEED}")
    if wanted.output_compression not in (None, 100) and wanted.output_format not in ("jpeg", "webp"):
        raise field_error("output_compression", "must be 100 or left out unless output_format is jpeg or webp")
    return wanted, inputs, fields.names


async def generate_images(
    request: Request, wanted: ImageRequest, inputs: dict[str, Input], names: FieldNames
) -> Response:
    """Submit, wait, answer."""
    quality = wanted.output_compression if wanted.output_format in ("jpeg", "webp") else None
    output = Output(wanted.output_format or "", quality=0 if quality is None else max(1, quality))
    request_id = await submit(request, inputs, names, model=wanted.model, seed=wanted.seed, n=wanted.n, output=output)
    if prefers_async(request):
        return await accepted(request, request_id)
    view = await wait(request, request_id, cancels=not idempotency_key(request))
    return await images_response(request, wanted, view)


def prefers_async(request: Request) -> bool:
    """Whether the client would rather be told where to look than wait: RFC 7240, section 4.1."""
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return "respond-async" in (preference.partition(";")[0].strip().lower() for preference in preferences)


async def accepted(request: Request, request_id: str) -> Response:
    """Answer 202, with the request as it is now and the place where it can be followed."""
    head: HeadClient = request.app.state.head
    view = await head.ask(QueryRequest(request_id, request.state.owner), RequestView)
    headers = {
        "Location": request_url(request, request_id),
        "Preference-Applied": "respond-async",
        "X-Request-Id": request_id,
    }
    return JSONResponse(request_object(request, view), status_code=202, headers=headers)


async def images_response(request: Request, wanted: ImageRequest, view: RequestView) -> Response:
    """Make OpenAI's answer, with the seed of each image beside it."""
    raise_unless_done(view)
    images = []
    for job in sorted(view.units, key=lambda job: job.index):
        if job.artifact is None:
            raise RuntimeError(f"{view.request_id} is {view.state}, but image {job.index} has no artifact")
        image = Image(job.seed, nsfw_content_detected=job.artifact.nsfw_content_detected)
        if wanted.response_format == "url":
            image.url = artifact_url(request, job.artifact.name)
        else:
            image.b64_json = await read_file(request, job.artifact.name)
        images.append(image)
    content = ImagesResponse(int(view.finished_at or time.time()), view.request_id, images)
    return JSONResponse(content, headers={"X-Request-Id": view.request_id})
