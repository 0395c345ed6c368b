"""POST /v1/images/generations, edits, variations: images, and with `Prefer: respond-async` where they will be."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta
from starlette.responses import Response

from triptych.api.artifacts import read_file
from triptych.api.errors import field_error
from triptych.api.image_stream import EventPrefix, requested_size, stream_images
from triptych.api.media_request import MediaRequest, ParsedRequest, read_media_request
from triptych.api.operations import EVENTS, Answer, RequestBody, operation
from triptych.api.requests import idempotency_key, raise_unless_done, request_object, submit, submit_and_view, wait
from triptych.api.responses import JSONResponse
from triptych.api.services import ApiRequest
from triptych.api.urls import artifact_url, request_url
from triptych.engines.parameters.schema import TENSORS, names
from triptych.roles.media.formats import FORMATS, REQUESTED_FORMATS
from triptych.roles.messages.common import Output
from triptych.roles.messages.requests import RequestView

if TYPE_CHECKING:
    OutputFormat: TypeAlias = str
else:
    OutputFormat = Literal[REQUESTED_FORMATS]


class ImageRequest(MediaRequest, frozen=True, kw_only=True):
    """The body."""

    n: Annotated[int, Meta(ge=1, le=10)] = 1
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: OutputFormat | None = None
    """By default the one that suits what the model makes."""
    output_compression: Annotated[int, Meta(ge=0, le=100)] | None = None
    """Of lossy formats: 100 is the best and largest."""
    stream: bool | None = None
    """Whether the images come as server-sent events, each as soon as it is done, and before it its `partial_images`."""


class Image(msgspec.Struct, omit_defaults=True):
    """One image of the answer."""

    seed: int
    b64_json: bytes | None = None
    url: str | None = None
    nsfw_content_detected: bool | None = None
    """True: the safety checker of the model has made the image black; left out where the model has none."""


class ImagesResponse(msgspec.Struct, omit_defaults=True):
    """OpenAI's answer, with the id of the request. There is no `usage`, since nothing is counted in tokens."""

    created: int
    """Unix seconds."""
    id: str
    data: list[Image]
    output_format: str | None = None
    size: str | None = None
    """WIDTHxHEIGHT in pixels; left out where the model chooses."""


_ANSWERS: Final[dict[int, Answer]] = {200: (ImagesResponse, EVENTS), 202: "Request"}
_LOSSY: Final = tuple(name for name in REQUESTED_FORMATS if FORMATS[name].lossy)
_ERRORS: Final = (409, 410, 500, 504)
_HEADERS: Final = ("Prefer", "Idempotency-Key")
_FILES: Final = {
    "image": "An image, PNG, JPEG or WebP; or several of them.",
    "mask": "What of the image to paint anew: what is transparent, else what is white. As large as the image.",
}
_ONE_IMAGE: Final = {"image": "The image, PNG, JPEG or WebP."}


@operation(_ANSWERS, _ERRORS, headers=_HEADERS, body=RequestBody(ImageRequest, _FILES))
async def create_image(request: ApiRequest) -> Response:
    """Make images of a prompt, and of images, and wait for them.

    A client that hangs up cancels its request, unless it sent an Idempotency-Key to ask again with.
    """
    return await _generate(request, await _read_image_request(request), "image_generation")


@operation(_ANSWERS, _ERRORS, headers=_HEADERS, body=RequestBody(ImageRequest, _FILES, required=("image",)))
async def create_image_edit(request: ApiRequest) -> Response:
    """Make images of an image, within a mask or all over, and wait for them."""
    return await _generate(request, await _read_edit(request), "image_edit")


@operation(_ANSWERS, _ERRORS, headers=_HEADERS, body=RequestBody(ImageRequest, _ONE_IMAGE, required=("image",)))
async def create_image_variation(request: ApiRequest) -> Response:
    """Make images like an image, without a prompt, and wait for them."""
    parsed = await _read_edit(request)
    if parsed.inputs.keys().isdisjoint(("prompt", TENSORS)):
        description = await request.state["services"].head.kept_description(parsed.fields.model or "")
        taken = names(description.parameters)
        if not taken or "prompt" in taken:
            parsed.inputs["prompt"] = ""
    return await _generate(request, parsed, "image_edit")


async def _read_edit(request: ApiRequest) -> ParsedRequest[ImageRequest]:
    parsed = await _read_image_request(request)
    if parsed.inputs.get("image") is None:
        raise parsed.names.invalid("image", "is required")
    return parsed


async def _read_image_request(request: ApiRequest) -> ParsedRequest[ImageRequest]:
    parsed = await read_media_request(request, ImageRequest)
    fields = parsed.fields
    if fields.output_compression not in (None, 100) and fields.output_format not in _LOSSY:
        raise field_error(
            "output_compression", f"must be 100 or left out unless output_format is {' or '.join(_LOSSY)}"
        )
    return parsed


async def _generate(request: ApiRequest, parsed: ParsedRequest[ImageRequest], prefix: EventPrefix) -> Response:
    fields = parsed.fields
    quality = fields.output_compression if fields.output_format in _LOSSY else None
    quality = 0 if quality is None else max(1, quality)
    output = Output(fields.output_format or "", quality=quality, metadata=fields.metadata)
    n = len(fields.seed) if isinstance(fields.seed, tuple) and "n" not in parsed.given else fields.n
    if not fields.stream and _prefers_async(request):
        return _accepted(request, await submit_and_view(request, parsed, n=n, output=output))
    request_id = await submit(request, parsed, n=n, output=output)
    if fields.stream:
        return stream_images(request, request_id, prefix)
    view = await wait(request, request_id, cancels=not idempotency_key(request))
    return await _images_response(request, view, as_urls=fields.response_format == "url")


def _prefers_async(request: ApiRequest) -> bool:
    """Whether the client asks not to wait: RFC 7240, section 4.1."""
    preferences = ",".join(request.headers.getlist("prefer")).split(",")
    return "respond-async" in (preference.partition(";")[0].strip().lower() for preference in preferences)


def _accepted(request: ApiRequest, view: RequestView) -> Response:
    """Answer 202, with the request as it is now and the URL to follow it."""
    headers = {
        "Location": request_url(request, view.request_id),
        "Preference-Applied": "respond-async",
        "X-Request-Id": view.request_id,
    }
    return JSONResponse(request_object(request, view), status_code=202, headers=headers)


async def _images_response(request: ApiRequest, view: RequestView, *, as_urls: bool) -> Response:
    """Make OpenAI's answer, with the seed of each image beside it."""
    raise_unless_done(view)
    images = []
    for job in sorted(view.units, key=lambda job: job.index):
        if job.artifact is None:
            raise RuntimeError(f"{view.request_id} is {view.state}, but image {job.index} has no artifact")
        image = Image(job.seed, nsfw_content_detected=job.artifact.nsfw_content_detected)
        if as_urls:
            image.url = artifact_url(request, job.artifact.name)
        else:
            image.b64_json = await read_file(request, job.artifact.name)
        images.append(image)
    first = view.units[0].artifact
    output_format = first.name.rpartition(".")[2] if first else None
    created = int(view.finished_at or time.time())
    content = ImagesResponse(created, view.request_id, images, output_format, requested_size(view))
    return JSONResponse(content, headers={"X-Request-Id": view.request_id})
