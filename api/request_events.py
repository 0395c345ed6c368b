"""GET /v1/requests/{id}/events: what happens to a request, as server-sent events."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Final, NamedTuple

import structlog
from starlette.responses import Response

from triptych.api.event_stream import ALIVE, ServerEvent, event_stream
from triptych.api.operations import EVENTS, operation
from triptych.api.requests import request_object
from triptych.api.services import ApiRequest
from triptych.api.urls import artifact_url
from triptych.bus import BusError
from triptych.roles.messages.requests import JobView, RequestView

log = structlog.stdlib.get_logger("api")

_REVISION: Final = re.compile(r"[0-9]{1,9}\.[0-9]{1,9}\.[0-9]{1,9}(-[0-9]{1,9}\.[0-9]{1,9}\.[0-9]{1,9}){0,63}")


class Seen(NamedTuple):
    """What a client knows of one job."""

    moves: int = 0
    step: int = 0
    previews: int = 0


@operation({200: EVENTS, 204: None}, (404, 503), headers=("Last-Event-ID",))
async def get_request_events(request: ApiRequest) -> Response:
    """Stream what happens to a request as server-sent events, until it has ended.

    `state`, `step` and `partial_image` are about one image or video, by its `index`; `ended` is the request. The id of
    an event says what has been sent: a client that comes back with it as Last-Event-ID gets what has happened since.
    """
    head, request_id = request.state["services"].head, request.path_params["request_id"]
    owner, revision = request.state["owner"], request.headers.get("last-event-id", "")
    view = await head.query(request_id, owner)  # raises what a stream that has begun could not say
    if view.terminal and revision == view.revision:
        return Response(status_code=204)  # which ends the attempts of an EventSource to connect again
    events = _events(request, view.request_id, revision if _REVISION.fullmatch(revision) else "")
    return event_stream(request, events)


async def _events(request: ApiRequest, request_id: str, revision: str) -> AsyncIterator[ServerEvent]:
    head, owner = request.state["services"].head, request.state["owner"]
    try:
        async for view in head.watch(request_id, owner, revision):
            if view.revision == revision and not view.terminal:
                yield ALIVE
                continue
            events = [*changes(view, revision, partial(artifact_url, request)), *_end(request, view)]
            for event in events[:-1]:
                yield event
            for event in events[-1:]:
                yield event._replace(id=view.revision)
            revision = view.revision
    except BusError as error:  # such as a request that was deleted; a client that connects again is told so
        log.info("a stream of events ends", request_id=request_id, error=repr(error))


def changes(view: RequestView, revision: str, url_of: Callable[[str], str]) -> Iterator[ServerEvent]:
    """Yield what a client that knows an earlier revision of a request has missed, job by job.

    Args:
        view: The request as it is.
        revision: The one that the client knows; "" for none.
        url_of: Makes the URL of an artifact of its name.
    """
    jobs = len(view.units)
    for job, seen, now in zip(view.units, seen_of(revision, jobs), seen_of(view.revision, jobs), strict=True):
        yield from _changes_of(job, seen, now.moves, url_of)


def seen_of(revision: str, jobs: int) -> list[Seen]:
    """Return what a client knows of each of so many jobs."""
    known = [Seen(*map(int, part.split("."))) for part in revision.split("-")] if revision else []
    return known if len(known) == jobs else [Seen()] * jobs


def _changes_of(job: JobView, seen: Seen, moves: int, url_of: Callable[[str], str]) -> Iterator[ServerEvent]:
    missed = moves - seen.moves  # counted from the end: a very long history has not all of them
    for move in job.history[max(0, len(job.history) - missed) :]:
        fields = {"index": job.index, "state": move.state, "at": move.at, "reason": move.reason}
        yield ServerEvent("state", fields)
    if job.step not in (0, seen.step) and job.total_steps:
        yield ServerEvent("step", {"index": job.index, "step": job.step, "total_steps": job.total_steps})
    for number, preview in enumerate(job.previews[seen.previews :], seen.previews):
        url = url_of(preview.artifact.name)
        fields = {"index": job.index, "partial_image_index": number, "step": preview.step, "url": url}
        yield ServerEvent("partial_image", fields)


def _end(request: ApiRequest, view: RequestView) -> Iterator[ServerEvent]:
    if view.terminal:
        yield ServerEvent("ended", request_object(request, view))
