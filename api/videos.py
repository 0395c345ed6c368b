"""POST /v1/videos, GET and DELETE: OpenAI's videos API."""

from __future__ import annotations

import asyncio
from typing import Annotated, Literal

import msgspec
from msgspec import Meta
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.responses import Response

from triptych.api.artifacts import send_file
from triptych.api.body_fields import read_fields
from triptych.api.errors import ApiError, field_error, not_found
from triptych.api.field_names import FieldNames
from triptych.api.head_client import HeadClient
from triptych.api.media_request import MediaRequest, Seed, parse_media_request, typed_fields, validation_error
from triptych.api.models import describe_model
from triptych.api.requests import Deleted, delete
from triptych.api.responses import JSONResponse
from triptych.api.submission import failure_reason, submit, with_request_id
from triptych.bus import RemoteError
from triptych.roles.messages.common import Input, Output
from triptych.roles.messages.requests import (
    FRAME_RATE_NAMES,
    JobView,
    ListModels,
    ListRequests,
    ModelDescription,
    ModelList,
    QueryRequest,
    RequestList,
    RequestView,
)

MAX_SECONDS = 3600.0
FORMAT = "mp4"

Status = Literal["queued", "in_progress", "completed", "failed"]
"""OpenAI's words; one that was cancelled has with_request_id, and its error says so."""

_QUEUED = ("PENDING", "ENCODER_WAITING")
_TERMINAL_STATUS: dict[str, Status] = {
    "DONE": "completed",
    "FAILED": "failed",
    "TIMED_OUT": "failed",
    "CANCELLED": "failed",
}
_AFTER_STEPS = ("DENOISING_DONE", "DECODER_WAITING", "DECODER_RUNNING")


class VideoRequest(MediaRequest, frozen=True, kw_only=True):
    """The body."""

    seed: Seed | None = None
    seconds: Annotated[float, Meta(gt=0, le=MAX_SECONDS)] | None = None
    """In place of `num_frames`."""


class VideoError(msgspec.Struct):
    """Why there is no video."""

    code: str
    message: str


class Video(msgspec.Struct):
    """OpenAI's video object: a job, and how far it is."""

    id: str
    status: Status
    progress: int
    """Percent of the denoising steps."""
    created_at: int
    """Unix seconds."""
    completed_at: int | None
    model: str
    seconds: str | None
    """As OpenAI has it, a number in a string; None where the number of frames does not tell."""
    size: str | None
    """WIDTHxHEIGHT in pixels; None where the model chooses."""
    error: VideoError | None = None
    object: Literal["video"] = "video"


class VideoList(msgspec.Struct):
    """OpenAI's list of videos."""

    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class ListQuery(msgspec.Struct, frozen=True):
    """What a list may be asked for."""

    after: str = ""
    limit: Annotated[int, Meta(ge=1, le=100)] = 20
    order: Literal["asc", "desc"] = "desc"


class Videos(HTTPEndpoint):
    """Begin videos, and list them."""

    async def get(self, request: Request) -> JSONResponse:
        """List what the head knows, the newest first unless asked otherwise."""
        head: HeadClient = request.app.state.head
        try:
            query = msgspec.convert(dict(request.query_params), ListQuery, strict=False)
        except msgspec.ValidationError as error:
            raise validation_error(error, ListQuery) from None
        owner, newest_first = request.state.owner, query.order == "desc"
        described = {one.name: one for one in (await head.ask(ListModels(), ModelList)).models}
        try:
            message = ListRequests(owner, query.after, query.limit, newest_first)
            found = await head.ask(message, RequestList)
        except RemoteError as error:
            if error.code != "not_found":
                raise
            raise not_found(f"there is no video {query.after}", param="after") from None
        views = (
            []
            if all(description.medium != "video" for description in described.values())
            else await asyncio.gather(
                *(head.ask(QueryRequest(id_, owner), RequestView) for id_ in found.request_ids), return_exceptions=True
            )
        )
        videos = []
        for view in views:
            if isinstance(view, RequestView):
                if (description := described.get(view.model)) and description.medium == "video":
                    videos.append(video_object(view, description))
            elif not (isinstance(view, RemoteError) and view.code == "not_found"):  # deleted meanwhile
                raise view
        first_id, last_id = (videos[0].id, videos[-1].id) if videos else (None, None)
        return JSONResponse(VideoList(videos, first_id, last_id, found.has_more and bool(videos)))

    async def post(self, request: Request) -> JSONResponse:
        """Submit, and answer at once with the job."""
        head: HeadClient = request.app.state.head
        fields = await read_fields(request, typed_fields(VideoRequest), FieldNames({"image": "input_reference"}))
        fields.from_form = True  # OpenAI's `seconds` is a string
        wanted, inputs = parse_media_request(fields, VideoRequest)
        description = await describe_model(head, wanted.model)
        check_medium(description)
        inputs |= frames_for_duration(wanted.seconds, inputs, description, fields.names)
        output = Output(FORMAT)
        request_id = await submit(
            request, inputs, fields.names, model=wanted.model, seed=wanted.seed, n=1, output=output
        )
        view = await head.ask(QueryRequest(request_id, request.state.owner), RequestView)
        return video_response(view, description)


class VideoResource(HTTPEndpoint):
    """One job."""

    async def get(self, request: Request) -> JSONResponse:
        """Answer with the job as it is now."""
        return video_response(*await find_video(request))

    async def delete(self, request: Request) -> JSONResponse:
        """Remove it, with its prompt and its file; one that is active is cancelled first."""
        view, _ = await find_video(request)
        if not await delete(request, view.request_id):
            raise not_found(f"there is no video {view.request_id}")
        return JSONResponse(Deleted(view.request_id, "video.deleted"))


async def video_content(request: Request) -> Response:
    """Answer with the file; raises ApiError 409 while there is none, 410 once it is gone."""
    view, description = await find_video(request)
    variant = request.query_params.get("variant", "video")
    if variant != "video":
        raise field_error("variant", "must be video or left out: there is nothing else of it")
    artifact = view.units[0].artifact
    if artifact is None:
        job = video_object(view, description)
        message = f"the video is {job.status.replace('_', ' ')}"
        if job.error:
            message += f": {job.error.message}"
        raise with_request_id(view.request_id, ApiError(409, message, code=job.status))
    return await send_file(request, artifact.name)


async def find_video(request: Request) -> tuple[RequestView, ModelDescription]:
    """Find the job of the path; raises ApiError 404."""
    head: HeadClient = request.app.state.head
    request_id = request.path_params["video_id"]
    view = await head.ask(QueryRequest(request_id, request.state.owner), RequestView)
    try:
        description = await describe_model(head, view.model)
    except ApiError:  # its model is served no more
        raise not_found(f"there is no video {request_id}") from None
    if description.parameters and description.medium != "video":
        raise not_found(f"there is no video {request_id}")
    return view, description


def check_medium(description: ModelDescription) -> None:
    """Raise ApiError 422 unless the model makes videos, 503 while nobody knows."""
    if not description.parameters:
        message = "no instance has loaded the model yet: try again"
        raise ApiError(503, message, code="unavailable")
    if description.medium != "video":
        predicate = f"{description.name} makes no videos but {description.medium}: ask POST /v1/images/generations"
        raise field_error("model", predicate)


def frames_for_duration(
    seconds: float | None, inputs: dict[str, Input], description: ModelDescription, names: FieldNames
) -> dict[str, Input]:
    """Return the number of frames that last so many seconds; nothing where no length is asked for."""
    if seconds is None:
        return {}
    if inputs.get("num_frames") is not None:
        raise field_error("seconds", "says the same as num_frames: give one of them")
    fps = next((inputs[name] for name in FRAME_RATE_NAMES if inputs.get(name) is not None), description.fps)
    if not isinstance(fps, int | float) or not 0 < fps <= 1000:
        raise field_error("seconds", "needs frames per second, which are not known: give fps as well, or num_frames")
    count = nearest_frame_count(seconds * fps, description)
    names.learn("num_frames", "seconds", f"the number of frames in seconds, {count} at {fps:g} per second,")
    return {"num_frames": count}


def nearest_frame_count(count: float, description: ModelDescription) -> int:
    """Return the number of frames next to `count` that the model can make."""
    every = next((parameter.every for parameter in description.parameters if parameter.name == "num_frames"), 0) or 1
    return 1 + every * max(0, round((count - 1) / every))


def video_response(view: RequestView, description: ModelDescription) -> JSONResponse:
    """Make the response."""
    return JSONResponse(video_object(view, description), headers={"X-Request-Id": view.request_id})


def video_object(view: RequestView, description: ModelDescription) -> Video:
    """Say in OpenAI's words how a request stands."""
    inputs: dict[str, Input] = {**description.defaults, **view.inputs}
    height, width = inputs.get("height"), inputs.get("width")
    count = inputs.get("num_frames")
    fps = view.output.fps or description.fps
    lasts = count / fps if isinstance(count, int) and fps else None
    job = view.units[0]
    return Video(
        id=view.request_id,
        status=status(view),
        progress=progress(job),
        created_at=int(view.created_at),
        completed_at=int(view.finished_at) if job.artifact else None,
        model=description.name,
        seconds=None if lasts is None else f"{lasts:.3g}",
        size=f"{width}x{height}" if width and height else None,
        error=VideoError(view.state.lower(), failure_reason(view) or "no reason is known")
        if status(view) == "failed"
        else None,
    )


def status(view: RequestView) -> Status:
    """OpenAI's word for the state."""
    return _TERMINAL_STATUS.get(view.state) or ("queued" if view.state in _QUEUED else "in_progress")


def progress(job: JobView) -> int:
    """Percent: denoising is what takes the time; 100 is said of a video that is there."""
    if job.state == "DONE":
        return 100
    if job.state in _AFTER_STEPS:
        return 99
    return min(99, 100 * job.step // job.total_steps) if job.total_steps else 0
