"""POST /v1/videos, GET and DELETE: OpenAI's videos API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta
from starlette.responses import Response

from triptych.api.artifacts import send_file
from triptych.api.errors import ApiError, field_error, not_found
from triptych.api.media_request import FieldNames, MediaRequest, Seed, read_media_request
from triptych.api.operations import FILE_ANSWERS, FILE_ERRORS, FILE_HEADERS, RequestBody, operation
from triptych.api.request_list import ListQuery, list_page, read_query, views_of
from triptych.api.requests import Deleted, failure_reason, submit, with_request_id
from triptych.api.responses import JSONResponse
from triptych.api.services import ApiRequest
from triptych.bus import RemoteError
from triptych.engines.parameters.schema import FRAME_RATE_NAMES
from triptych.roles.head.job import State
from triptych.roles.messages.common import Input, Output
from triptych.roles.messages.requests import JobView, ModelDescription, RequestView

MAX_SECONDS = 3600.0
FORMAT = "mp4"
POLL_AFTER_MS = 500
"""What OpenAI's clients wait before they ask again; theirs is a second."""

Status = Literal["queued", "in_progress", "completed", "failed"]
"""OpenAI's words; one that was cancelled has failed, and its error says so."""

_STATUS: Final[Mapping[State, Status]] = {
    State.PENDING: "queued",
    State.ENCODER_WAITING: "queued",
    State.DONE: "completed",
    State.FAILED: "failed",
    State.TIMED_OUT: "failed",
    State.CANCELLED: "failed",
}
"""Every other state is "in_progress"."""
_AFTER_STEPS: Final = (State.DENOISING_DONE, State.DECODER_WAITING, State.DECODER_RUNNING)
_FILES: Final = {"input_reference": "The first frame.", "last_image": "The last frame."}


class VideoRequest(MediaRequest, frozen=True, kw_only=True):
    """The body."""

    seed: Seed | None = None
    seconds: Annotated[float, Meta(gt=0, le=MAX_SECONDS)] | None = None
    """In place of `num_frames`."""


class VideoError(msgspec.Struct):
    """Why a video failed."""

    code: str
    message: str


class Video(msgspec.Struct):
    """OpenAI's video object: a job and its progress."""

    id: str
    status: Status
    progress: int
    """Percent of the denoising steps."""
    created_at: int
    """Unix seconds."""
    completed_at: int | None
    model: str
    seconds: str | None
    """A number in a string, as in OpenAI's API; None where the number of frames is unknown."""
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


class ContentQuery(msgspec.Struct, frozen=True):
    """Which file."""

    variant: Annotated[Literal["video"], Meta(description="Which file of the video.")] = "video"


@operation({200: VideoList}, (404, 422, 503), query=ListQuery)
async def list_videos(request: ApiRequest) -> JSONResponse:
    """List videos page by page, the newest first unless asked otherwise."""
    models = await request.state["services"].head.models()
    described = {one.name: one for one in models if one.medium == "video"}
    query = read_query(request, ListQuery)
    found = await list_page(request, query, of="video")
    views = await views_of(request, found.request_ids if described else ())
    videos = [video_object(view, described[view.model]) for view in views if view.model in described]
    first_id, last_id = (videos[0].id, videos[-1].id) if videos else (None, None)
    return JSONResponse(VideoList(videos, first_id, last_id, found.has_more and bool(videos)))


@operation({200: Video}, (409,), headers=("Idempotency-Key",), body=RequestBody(VideoRequest, _FILES))
async def create_video(request: ApiRequest) -> JSONResponse:
    """Begin a video, and answer at once with the job."""
    # OpenAI's `seconds` is a text in JSON, too.
    parsed = await read_media_request(request, VideoRequest, FieldNames({"image": "input_reference"}), lenient=True)
    description = await request.state["services"].head.kept_description(parsed.fields.model or "")
    check_medium(description)
    parsed.inputs.update(frames_for_duration(parsed.fields.seconds, parsed.inputs, description, parsed.names))
    request_id = await submit(request, parsed, n=1, output=Output(FORMAT))
    view = await request.state["services"].head.query(request_id, request.state["owner"])
    return video_response(view, description)


@operation({200: Video}, (404, 503))
async def get_video(request: ApiRequest) -> JSONResponse:
    """Show how far a video is."""
    return video_response(*await find_video(request))


@operation({200: Deleted}, (404, 503))
async def delete_video(request: ApiRequest) -> JSONResponse:
    """Cancel a video and remove it, its prompt and its file."""
    view, _ = await find_video(request)
    if not await request.state["services"].head.delete(view.request_id, request.state["owner"]):
        raise not_found(f"there is no video {view.request_id}")
    return JSONResponse(Deleted(view.request_id, "video.deleted"))


@operation({200: Video}, (404, 503))
async def cancel_video(request: ApiRequest) -> JSONResponse:
    """Cancel a video, and keep what is known of it; one that has ended stays as it is."""
    view, description = await find_video(request)
    head, owner = request.state["services"].head, request.state["owner"]
    return video_response(await head.cancel(view.request_id, owner), description)


@operation(FILE_ANSWERS, (*FILE_ERRORS, 409, 422, 503), headers=FILE_HEADERS, query=ContentQuery)
async def get_video_content(request: ApiRequest) -> Response:
    """Return the finished file; 409 while there is none."""
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


async def find_video(request: ApiRequest) -> tuple[RequestView, ModelDescription]:
    """Find the job of the path; raises ApiError 404."""
    request_id = request.path_params["video_id"]
    view = await request.state["services"].head.query(request_id, request.state["owner"])
    try:
        description = await request.state["services"].head.kept_description(view.model)
    except RemoteError as error:
        if error.code != "model_not_found":
            raise
        raise not_found(f"there is no video {request_id}") from None
    if description.parameters and description.medium != "video":
        raise not_found(f"there is no video {request_id}")
    return view, description


def check_medium(description: ModelDescription) -> None:
    """Raise ApiError 422 unless the model makes videos, 503 while that is unknown."""
    if not description.parameters:
        message = "no instance has loaded the model yet: retry later"
        raise ApiError(503, message, code="unavailable")
    if description.medium != "video":
        predicate = f"{description.name} makes no videos: send the request to POST /v1/images/generations"
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
    headers = {"X-Request-Id": view.request_id}
    if not view.terminal:
        headers["openai-poll-after-ms"] = str(POLL_AFTER_MS)
    return JSONResponse(video_object(view, description), headers=headers)


def video_object(view: RequestView, description: ModelDescription) -> Video:
    """Describe a request as OpenAI's video object."""
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
    """Return OpenAI's word for the state."""
    return _STATUS.get(State(view.state), "in_progress")


def progress(job: JobView) -> int:
    """Return the percentage of denoising steps done; 100 only once the video is finished."""
    if job.state == State.DONE:
        return 100
    if job.state in _AFTER_STEPS:
        return 99
    return min(99, 100 * job.step // job.total_steps) if job.total_steps else 0
