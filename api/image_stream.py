"""Images as OpenAI's server-sent events: each partial image, and each image as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any, Final, Literal

import structlog
from starlette.responses import Response

from triptych.api.artifacts import read_file
from triptych.api.errors import ApiError, error_object, from_bus, store_unavailable
from triptych.api.event_stream import ALIVE, ServerEvent, event_stream
from triptych.api.requests import idempotency_key, raise_unless_done, stopping_error
from triptych.api.services import ApiRequest
from triptych.bus import BusError
from triptych.roles.media.files import StoreUnavailableError
from triptych.roles.messages.common import Artifact
from triptych.roles.messages.requests import JobView, RequestView

log = structlog.stdlib.get_logger("api")

EventPrefix = Literal["image_generation", "image_edit"]

NO_TOKENS: Final[Mapping[str, object]] = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""OpenAI's `usage`, which its clients read of each event: nothing here is counted in tokens."""


def stream_images(request: ApiRequest, request_id: str, prefix: EventPrefix) -> Response:
    """Answer with PREFIX.partial_image and PREFIX.completed events, with `index` and `seed` beside OpenAI's fields.

    A failure is an `error` event, which is the last one. A client that hangs up cancels its request, unless it sent an
    Idempotency-Key to ask again with; whatever else ends the stream leaves the request as it is.
    """
    cancel = partial(request.state["services"].head.cancel_later, request_id, "the client hung up")
    return event_stream(
        request,
        _events(request, request_id, prefix),
        {"X-Request-Id": request_id},
        at_stop=_error_event(stopping_error(request_id)),
        on_disconnect=None if idempotency_key(request) else cancel,
    )


async def _events(request: ApiRequest, request_id: str, prefix: EventPrefix) -> AsyncIterator[ServerEvent]:
    head, sent = request.state["services"].head, set[str]()
    size = ""
    try:
        async for view in head.watch(request_id, request.state["owner"]):
            size = size or requested_size(view) or "auto"  # of the first view: later ones have no inputs
            found = [(position, number, made) for position, number, made in _made(view) if made.name not in sent]
            for position, number, artifact in found:
                sent.add(artifact.name)
                fields = await _image(request, view.units[position], size, artifact)
                if number is None:
                    yield _event(f"{prefix}.completed", {**fields, "usage": NO_TOKENS})
                else:
                    yield _event(f"{prefix}.partial_image", {**fields, "partial_image_index": number})
            if not found:
                yield ALIVE
            if view.terminal:
                raise_unless_done(view)
    except ApiError as error:
        yield _error_event(error)
    except BusError as error:
        log.warning("a stream of images ends", request_id=request_id, error=repr(error))
        yield _error_event(from_bus(error))
    except StoreUnavailableError as error:
        log.warning("a stream of images ends", request_id=request_id, error=repr(error))
        yield _error_event(store_unavailable())


def _made(view: RequestView) -> list[tuple[int, int | None, Artifact]]:
    """Return the position of each job that has made something, the number of the partial image, and the file."""
    partial_images = [
        (position, number, preview.artifact)
        for position, job in enumerate(view.units)
        for number, preview in enumerate(job.previews)
        if job.artifact is None
    ]
    finished = [(position, None, job.artifact) for position, job in enumerate(view.units) if job.artifact]
    return [*partial_images, *finished]


async def _image(request: ApiRequest, job: JobView, size: str, artifact: Artifact) -> dict[str, Any]:
    return {
        "b64_json": await read_file(request, artifact.name),
        "created_at": int(time.time()),
        "size": size,
        "quality": "auto",
        "background": "opaque",
        "output_format": artifact.content_type.rpartition("/")[2],
        "index": job.index,
        "seed": job.seed,
    }


def requested_size(view: RequestView) -> str | None:
    """Return WIDTHxHEIGHT in pixels; None where the model chooses."""
    height, width = view.inputs.get("height"), view.inputs.get("width")
    return f"{width}x{height}" if width and height else None


def _event(name: str, fields: dict[str, Any]) -> ServerEvent:
    return ServerEvent(name, {"type": name, **fields})


def _error_event(error: ApiError) -> ServerEvent:
    return _event("error", {"error": error_object(error)})
