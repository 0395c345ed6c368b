"""OpenAI's videos API: a video is a request for an MP4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta
from starlette.responses import Response

from triptych.api.artifacts import artifact_expired, send_file
from triptych.api.errors import ApiError, field_error, not_found
from triptych.api.media_request import (
    FieldNames,
    MediaRequest,
    ParsedRequest,
    Seed,
    read_fields,
    read_media_request,
)
from triptych.api.operations import FILE_ANSWERS, FILE_ERRORS, FILE_HEADERS, RequestBody, operation
from triptych.api.request_list import ListQuery, list_page, read_query, views_of
from triptych.api.requests import Deleted, failure_reason, submit_and_view, with_request_id
from triptych.api.responses import JSONResponse
from triptych.api.services import ApiRequest
from triptych.bus import BusError, RemoteError
from triptych.engines.parameters.schema import FRAME_RATE_NAMES
from triptych.engines.parameters.validation import MAX_TEXT
from triptych.roles.head.job import State
from triptych.roles.media.artifacts import ArtifactMissingError
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
_POLL: Final = ("openai-poll-after-ms",)
_AFTER_STEPS: Final = (State.DENOISING_DONE, State.DECODER_WAITING, State.DECODER_RUNNING)
_FILES: Final = {
    "input_reference": "The first frame; or the video to start from, where the model takes one.",
    "last_image": "The last frame.",
    "video": "The video to start from, an MP4 or WebM, or its frames; where the model takes one.",
}


class VideoRequest(MediaRequest, frozen=True, kw_only=True):
    """The body."""

    seed: Seed | None = None
    seconds: Annotated[float, Meta(gt=0, le=MAX_SECONDS)] | None = None
    """In place of `num_frames`."""


class RemixRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a remix."""

    prompt: Annotated[str, Meta(min_length=1, max_length=MAX_TEXT)]


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
    prompt: str | None
    expires_at: int | None
    """Unix seconds until which its file is kept, unless there are too many; None without a file."""
    remixed_from_video_id: str | None
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

    variant: Annotated[
        Literal["video", "thumbnail", "spritesheet"],
        Meta(
            description="video, an MP4; thumbnail, a WebP of the first frame; spritesheet, a JPEG of up to 25 frames "
            "at equal distances, five in a row."
        ),
    ] = "video"


@operation({200: VideoList}, (404, 422, 503), query=ListQuery)
async def list_videos(request: ApiRequest) -> JSONResponse:
    """List videos page by page, the newest first unless asked otherwise."""
    query = read_query(request, ListQuery)
    found = await list_page(request, query, of="video", output_format=FORMAT)
    views = await views_of(request, found.request_ids)
    described = {one.name: one for one in await request.state["services"].head.models()} if views else {}
    videos = [video_object(request, view, described.get(view.model)) for view in views]
    first_id, last_id = (videos[0].id, videos[-1].id) if videos else (None, None)
    return JSONResponse(VideoList(videos, first_id, last_id, found.has_more and bool(videos)))


@operation(
    {200: Video},
    (409,),
    headers=("Idempotency-Key",),
    answer_headers=_POLL,
    body=RequestBody(VideoRequest, _FILES),
)
async def create_video(request: ApiRequest) -> JSONResponse:
    """Begin a video, and answer at once with the job."""
    # OpenAI's `seconds` is a text in JSON, too.
    parsed = await read_media_request(request, VideoRequest, FieldNames({"image": "input_reference"}), lenient=True)
    description = await request.state["services"].head.kept_description(parsed.fields.model or "")
    check_medium(description)
    parsed.inputs.update(frames_for_duration(parsed.fields.seconds, parsed.inputs, description, parsed.names))
    output = Output(FORMAT, metadata=parsed.fields.metadata)
    return await _video_response(request, await submit_and_view(request, parsed, n=1, output=output))


@operation(
    {200: Video},
    (404, 409, 410),
    headers=("Idempotency-Key",),
    answer_headers=_POLL,
    body=RequestBody(RemixRequest, {}, closed=True),
)
async def remix_video(request: ApiRequest) -> JSONResponse:
    """Begin a video like another one, with its seed and all its parameters but the prompt."""
    view = await find_video(request)
    body = await read_fields(request, RemixRequest)
    await request.state["services"].uploads.renew(view.inputs)
    fields = VideoRequest(prompt=body.prompt, model=view.model, seed=view.units[0].seed)
    parsed = ParsedRequest(fields, frozenset({"prompt"}), {**view.inputs, "prompt": body.prompt}, FieldNames())
    remixed = await submit_and_view(request, parsed, n=1, output=view.output, remixed_from=view.request_id)
    return await _video_response(request, remixed)


@operation({200: Video}, (404, 503), answer_headers=_POLL)
async def get_video(request: ApiRequest) -> JSONResponse:
    """Show how far a video is."""
    return await _video_response(request, await find_video(request))


@operation({200: Deleted}, (404, 503))
async def delete_video(request: ApiRequest) -> JSONResponse:
    """Cancel a video and remove it, its prompt and its files."""
    view = await find_video(request)
    if not await request.state["services"].head.delete(view.request_id, request.state["owner"]):
        raise _no_video(view.request_id)
    return JSONResponse(Deleted(view.request_id, "video.deleted"))


@operation({200: Video}, (404, 503), answer_headers=_POLL)
async def cancel_video(request: ApiRequest) -> JSONResponse:
    """Cancel a video, and keep what is known of it; one that has ended stays as it is."""
    view = await find_video(request)
    head, owner = request.state["services"].head, request.state["owner"]
    return await _video_response(request, await head.cancel(view.request_id, owner))


@operation(FILE_ANSWERS, (*FILE_ERRORS, 409, 422, 503), headers=FILE_HEADERS, query=ContentQuery)
async def get_video_content(request: ApiRequest) -> Response:
    """Return the finished file, or an image of it; 409 while there is none."""
    variant = read_query(request, ContentQuery).variant
    view = await find_video(request)
    artifact = view.units[0].artifact
    if artifact is None:
        job = video_object(request, view, None)
        message = f"the video is {job.status.replace('_', ' ')}"
        if job.error:
            message += f": {job.error.message}"
        raise with_request_id(view.request_id, ApiError(409, message, code=job.status))
    name = artifact.name if variant == "video" else await _variant_of(request, view, artifact.name, variant)
    return await send_file(request, name)


async def _variant_of(request: ApiRequest, view: RequestView, artifact: str, variant: str) -> str:
    """Return the name of the file of a variant; raises ApiError 404 where the video is deleted meanwhile, 410, 503."""
    variants, job_id = request.state["services"].variants, f"{view.request_id}/{view.units[0].index}"
    try:
        name, is_new = await variants.find_or_make(artifact, job_id, variant)
    except ArtifactMissingError:
        raise artifact_expired(artifact) from None
    if is_new:
        try:
            await find_video(request)
        except (ApiError, BusError):  # nobody would remove the new file
            await variants.discard(job_id, variant)
            raise
    return name


async def find_video(request: ApiRequest) -> RequestView:
    """Find the job of the path; raises ApiError 404."""
    request_id = request.path_params["video_id"]
    try:
        view = await _query(request, request_id)
    except RemoteError as error:
        if error.code != "not_found":
            raise
        raise _no_video(request_id) from None
    if view.output.format != FORMAT:
        raise _no_video(request_id)
    return view


async def _query(request: ApiRequest, request_id: str) -> RequestView:
    return await request.state["services"].head.query(request_id, request.state["owner"])


def _no_video(request_id: str) -> ApiError:
    return not_found(f"there is no video {request_id}")


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


async def _video_response(request: ApiRequest, view: RequestView) -> JSONResponse:
    try:
        description = await request.state["services"].head.kept_description(view.model)
    except RemoteError as error:
        if error.code != "model_not_found":
            raise
        description = None
    headers = {"X-Request-Id": view.request_id}
    if not view.terminal:
        headers["openai-poll-after-ms"] = str(POLL_AFTER_MS)
    return JSONResponse(video_object(request, view, description), headers=headers)


def video_object(request: ApiRequest, view: RequestView, description: ModelDescription | None) -> Video:
    """Describe a request as OpenAI's video object; without a description of its model where that is served no more."""
    taken = {each.name: each.default for each in description.parameters} if description else {}
    inputs: dict[str, object] = dict(taken)
    if description is not None:
        inputs |= {name: value for name, value in description.defaults.items() if name in taken}
    inputs |= view.inputs
    height, width, count, prompt = (inputs.get(name) for name in ("height", "width", "num_frames", "prompt"))
    fps = view.output.fps or (description.fps if description else 0)
    job, state = view.units[0], request.state["services"].topology.state
    kept_s = min(state.keep_artifacts_s, state.keep_requests_s)
    return Video(
        id=view.request_id,
        status=status(view),
        progress=progress(job),
        created_at=int(view.created_at),
        completed_at=int(view.finished_at) if job.artifact else None,
        model=view.model,
        seconds=f"{round(count / fps, 2):g}" if isinstance(count, int) and fps else None,
        size=f"{width}x{height}" if width and height else None,
        prompt=prompt if isinstance(prompt, str) else None,
        expires_at=int(view.finished_at + kept_s) if job.artifact else None,
        remixed_from_video_id=view.remixed_from or None,
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
