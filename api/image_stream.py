"""Images as OpenAI's server-sent events: each partial image, and each image as soon as it is done."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final, Literal

from triptych.api.artifacts import read_file
from triptych.api.errors import ApiError, error_object
from triptych.api.event_stream import ALIVE, ServerEvent
from triptych.api.requests import idempotency_key, raise_unless_done
from triptych.api.services import ApiRequest
from triptych.roles.messages.common import Artifact
from triptych.roles.messages.requests import RequestView

EventPrefix = Literal["image_generation", "image_edit"]

NO_TOKENS: Final[Mapping[str, object]] = {
    "input_tokens": 0,
    "output_tokens": 0,
    "total_tokens": 0,
    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
}
"""OpenAI's `usage`, which its clients read of each event: nothing here is counted in tokens."""


async def stream_images(request: ApiRequest, request_id: str, prefix: EventPrefix) -> AsyncIterator[ServerEvent]:
    """Yield PREFIX.partial_image and PREFIX.completed events, with `index` and `seed` beside OpenAI's fields.

    A failure is an `error` event, which is the last one. A client that hangs up cancels its request, unless it sent an
    Idempotency-Key to ask again with.
    """
    head, sent, ended = request.state["services"].head, set[str](), False
    try:
        async for view in head.watch(request_id, request.state["owner"]):
            found = [(name, number, artifact) for name, number, artifact in _made(view) if artifact.name not in sent]
            for unit, number, artifact in found:
                sent.add(artifact.name)
                fields = await _image(request, view, unit, artifact)
                if number is None:
                    yield _event(f"{prefix}.completed", {**fields, "usage": NO_TOKENS})
                else:
                    yield _event(f"{prefix}.partial_image", {**fields, "partial_image_index": number})
            if not found:
                yield ALIVE
            ended = view.terminal
            if ended:
                raise_unless_done(view)
    except ApiError as error:
        yield _event("error", {"error": error_object(error)})
    finally:
        if not ended and not idempotency_key(request):
            head.cancel_later(request_id, "the client hung up")


def _made(view: RequestView) -> list[tuple[int, int | None, Artifact]]:
    """Return the position of each job that has made something, the number of the partial image, and the file."""
    partial = [
        (unit, number, preview.artifact)
        for unit, job in enumerate(view.units)
        for number, preview in enumerate(job.previews)
        if job.artifact is None
    ]
    return [*partial, *((unit, None, job.artifact) for unit, job in enumerate(view.units) if job.artifact)]


async def _image(request: ApiRequest, view: RequestView, unit: int, artifact: Artifact) -> dict[str, Any]:
    job = view.units[unit]
    return {
        "b64_json": await read_file(request, artifact.name),
        "created_at": int(time.time()),
        "size": requested_size(view) or "auto",
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
