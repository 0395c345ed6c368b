"""LightX2V's API: /v1/tasks and what its clients ask besides, onto the same requests as /v1/images and /v1/videos.

A task is a request with one image or video, and every request is a task here. Field names and answers are LightX2V's,
errors are OpenAI's; what has no meaning here is refused by name.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, ClassVar, Final, Literal, TypeVar

import msgspec
from msgspec import Meta
from starlette.responses import Response
from starlette.routing import Route

from triptych.api.artifacts import get_file, send_file
from triptych.api.errors import ApiError, field_error, not_found
from triptych.api.media_request import FieldNames, MediaRequest, NoEffectField, Steps, read_media_request
from triptych.api.operations import (
    FILE,
    FILE_ANSWERS,
    FILE_ERRORS,
    FILE_HEADERS,
    Endpoint,
    RequestBody,
    by_method,
    operation,
)
from triptych.api.request_list import ListQuery, gather_found, list_page, read_query, views_of
from triptych.api.requests import failure_reason, idempotency_key, raise_unless_done, submit, wait, with_request_id
from triptych.api.responses import JSONResponse
from triptych.api.services import ApiRequest
from triptych.bus import RemoteError
from triptych.roles.head.job import RUNNING, State
from triptych.roles.messages.common import Input, Output
from triptych.roles.messages.requests import ClusterView, ListRequests, ModelDescription, RequestView
from triptych.roles.tracing import REQUEST_ID_PATTERN

MAX_SIDE: Final = 65_535
MAX_LISTED: Final = 100
LISTED_AT_ONCE: Final = 1000
_SIDE_STEP: Final = 16
"""Sides are multiples of it, where the model says nothing else."""
_OWN_ID: Final = re.compile(rf"{REQUEST_ID_PATTERN}|task_[0-9a-f]{{32}}")
_RATIO: Final = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)")
_VIDEO: Final = Output("mp4")

Status = Literal["pending", "processing", "completed", "failed", "cancelled"]
_STATUS: Final[Mapping[State, Status]] = {
    State.PENDING: "pending",
    State.ENCODER_WAITING: "pending",
    State.DONE: "completed",
    State.FAILED: "failed",
    State.TIMED_OUT: "failed",
    State.CANCELLED: "cancelled",
}
"""Every other state is "processing"."""
_RUNNING: Final = frozenset(RUNNING.values())
_ALIASES: Final = {
    "image_path": ("image",),
    "image_file": ("image",),
    "image_mask_path": ("mask_image",),
    "last_frame_path": ("last_image",),
    "last_frame_file": ("last_image",),
    "video_path": ("video",),
    "i2i_denoise_strength": ("strength",),
    "lora_name": ("lora",),
    "lora_strength": ("lora_scale",),
    "target_video_length": ("num_frames",),
    "target_fps": ("fps",),
}
_NO_SOUND: Final = NoEffectField((), "no sound is taken here")
_NO_EFFECT: Final = {
    "use_prompt_enhancer": NoEffectField(("false",), "no prompt is rewritten here"),
    "reuse": NoEffectField(("false",), "each task is computed from its own fields"),
    "presigned_url": NoEffectField((), "results are fetched from /v1/tasks/TASK_ID/result"),
    "num_fragments": NoEffectField(("1",), "a video is made in one piece"),
    "sr_ratio": NoEffectField(("2", "2.0"), "the model says how large its result is"),
    "resize_mode": NoEffectField(("adaptive",), "the pipeline resizes an image as it does in diffusers"),
    "talk_objects": _NO_SOUND,
    "audio_path": _NO_SOUND,
    "audio_file": _NO_SOUND,
}
_FIELD_OF: Final = {
    **{parameter: field for field, (parameter,) in reversed(_ALIASES.items())},
    "num_inference_steps": "infer_steps",
    "request_id": "task_id",
}
_FILES: Final = {
    "image_path": "The image to begin with, or the first frame.",
    "last_frame_path": "The last frame.",
    "image_mask_path": "What of the image to paint anew.",
}
Side = Annotated[int, Meta(ge=1, le=MAX_SIDE)]


class VideoTask(MediaRequest, frozen=True, kw_only=True):
    """The body of a task for a video. The path fields take base64; null, "" and [] are the same as not given."""

    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = _ALIASES
    no_effect: ClassVar[Mapping[str, NoEffectField]] = _NO_EFFECT
    empty_is_absent: ClassVar[bool] = True

    num_inference_steps: Steps | None = msgspec.field(default=None, name="infer_steps")
    task_id: Annotated[str, Meta(max_length=128)] = ""
    """The client's name for the task; by default it gets one."""
    save_result_path: Annotated[str, Meta(max_length=1024)] = ""
    """Said back, and not used: nothing is written where a client says."""
    target_shape: tuple[Side, Side] | None = None
    """Height and width in pixels."""
    video_duration: float | None = None
    """Taken and not used, as by LightX2V for models that follow no sound."""


class ImageTask(VideoTask, frozen=True, kw_only=True):
    """The body of a task for an image."""

    aspect_ratio: Annotated[str, Meta(max_length=8)] = ""
    """As in 16:9: the sides that the model can make with this ratio and as many pixels as by default. It gives way to
    `target_shape`, and to an image."""


class TaskResponse(msgspec.Struct):
    """The answer to a task that is accepted."""

    task_id: str
    task_status: Literal["pending"]
    save_result_path: str


class TaskStatus(msgspec.Struct):
    """Where a task stands."""

    task_id: str
    status: Status
    start_time: str
    """When it was first computed, before that when it was accepted; ISO 8601."""
    end_time: str | None
    error: str | None
    error_type: str
    """ValueError, TimeoutError or RuntimeError; "" where it has not failed."""
    save_result_path: str | None
    """The name of its file, which /v1/files/download/NAME has."""


class StopTaskResponse(msgspec.Struct):
    """Whether a task was stopped."""

    stop_status: Literal["success", "do_nothing"]
    reason: str


class QueueStatus(msgspec.Struct):
    """What runs and waits, in images and videos."""

    is_processing: bool
    current_task: str | None
    pending_count: int
    active_count: int
    queue_size: int
    queue_available: int


class ServiceStatus(msgspec.Struct):
    """What runs and waits, and what has ended since the head was started."""

    service_status: Literal["busy", "idle"]
    current_task: str | None
    active_tasks: list[str]
    pending_tasks: int
    queue_size: int
    total_tasks: int
    completed_tasks: int
    failed_tasks: int


class SyncQuery(msgspec.Struct, frozen=True):
    """How long to wait."""

    timeout_seconds: Annotated[
        float,
        Meta(
            gt=0,
            le=86_400,
            description="Then the task is cancelled, unless it came with a task_id or an Idempotency-Key.",
        ),
    ] = 600.0
    poll_interval_seconds: Annotated[float, Meta(gt=0, le=86_400, description="Taken and not used.")] = 0.5


T = TypeVar("T", bound=VideoTask)
_HEADERS: Final = ("Idempotency-Key",)


@operation({200: TaskResponse}, (409,), headers=_HEADERS, body=RequestBody(ImageTask, _FILES))
async def create_image_task(request: ApiRequest) -> JSONResponse:
    """Begin an image, and answer at once with its task."""
    return _accepted(request, *await _begin(request, ImageTask, Output()))


@operation({200: FILE}, (409, 410, 500, 504), headers=_HEADERS, query=SyncQuery, body=RequestBody(ImageTask, _FILES))
async def create_image_task_sync(request: ApiRequest) -> Response:
    """Make an image, and answer with its file.

    A client that hangs up cancels its task, unless it named it by task_id or Idempotency-Key to ask again with.
    """
    within_s = read_query(request, SyncQuery).timeout_seconds
    request_id, fields = await _begin(request, ImageTask, Output())
    cancels = not (idempotency_key(request) or fields.task_id)
    try:
        async with asyncio.timeout(within_s):
            view = await wait(request, request_id, cancels=cancels)
    except TimeoutError:
        message = f"the task took longer than timeout_seconds, {within_s:g}, and "
        if cancels:
            await request.state["services"].head.cancel(request_id, request.state["owner"], "the client's time is up")
            message += "is cancelled"
        else:
            message += f"goes on: send it again, or ask GET /v1/tasks/{request_id}/status"
        raise with_request_id(request_id, ApiError(504, message, code="timed_out")) from None
    raise_unless_done(view)
    artifact = view.units[0].artifact
    if artifact is None:
        raise RuntimeError(f"{request_id} is {view.state}, but has no artifact")
    response = await send_file(request, artifact.name)
    response.headers.update({"X-Request-Id": request_id, "Content-Disposition": f'inline; filename="{artifact.name}"'})
    return response


@operation({200: TaskResponse}, (409,), headers=_HEADERS, body=RequestBody(VideoTask, _FILES))
async def create_video_task(request: ApiRequest) -> JSONResponse:
    """Begin a video, and answer at once with its task."""
    return _accepted(request, *await _begin(request, VideoTask, _VIDEO))


@operation({200: TaskResponse}, (409,), headers=_HEADERS, body=RequestBody(VideoTask, _FILES))
async def create_task(request: ApiRequest) -> JSONResponse:
    """Begin a video, as at /v1/tasks/video/."""
    return await create_video_task(request)


async def _begin(request: ApiRequest, kind: type[T], output: Output) -> tuple[str, T]:
    parsed = await read_media_request(request, kind, FieldNames(_FIELD_OF))
    fields = parsed.fields
    if _OWN_ID.fullmatch(fields.task_id):
        raise field_error("task_id", "must not look like an id of this server: choose another, or leave it out")
    description = await request.state["services"].head.kept_description(fields.model or "")
    if output == _VIDEO and description.parameters and description.medium != "video":
        raise field_error("model", f"{description.name} makes no videos: send the task to /v1/tasks/image/")
    if isinstance(fields, ImageTask):
        parsed.inputs.update(size_of_ratio(fields.aspect_ratio, parsed.inputs, fields.target_shape, description))
    if fields.target_shape:
        parsed.inputs.update(sides_of(fields.target_shape, parsed.inputs, parsed.names))
    own = request_id_of(request.state["owner"], fields.task_id) if fields.task_id else ""
    try:
        return await submit(request, parsed, n=1, output=output, request_id=own), fields
    except ApiError as error:
        if error.code != "conflict" or not own or idempotency_key(request):
            raise
        raise field_error("task_id", "came with another body before", status=409, code="conflict") from None


def _accepted(request: ApiRequest, request_id: str, fields: VideoTask) -> JSONResponse:
    named = request_id == request_id_of(request.state["owner"], fields.task_id)
    task_id = fields.task_id if named else request_id  # an Idempotency-Key may have found an earlier one
    answer = TaskResponse(task_id, "pending", fields.save_result_path or task_id)
    return JSONResponse(answer, headers={"X-Request-Id": request_id})


@operation({200: "TaskList"}, (503,))
async def list_tasks(request: ApiRequest) -> JSONResponse:
    """Show the newest tasks, by id."""
    found = await list_page(request, ListQuery(limit=MAX_LISTED))
    views = await views_of(request, found.request_ids)
    return JSONResponse({view.request_id: task_status(view, view.request_id) for view in views})


@operation({200: TaskStatus}, (404, 503))
async def get_task_status(request: ApiRequest) -> JSONResponse:
    """Show where a task stands."""
    return JSONResponse(task_status(await _find(request), request.path_params["task_id"]))


@operation(FILE_ANSWERS, (*FILE_ERRORS, 503), headers=FILE_HEADERS)
async def get_task_result(request: ApiRequest) -> Response:
    """Return the file of a task; 404 while there is none."""
    view = await _find(request)
    artifact = view.units[0].artifact
    if artifact is None:
        raise not_found(f"the task is {task_status(view, '').status}: it has no result", code="not_completed")
    response = await send_file(request, artifact.name)
    response.headers["Content-Disposition"] = f'attachment; filename="{artifact.name}"'
    return response


@operation({200: StopTaskResponse}, (503,))
async def delete_task(request: ApiRequest) -> JSONResponse:
    """Stop a task, and keep what is known of it; one that has ended, or is not there, stays as it is."""
    try:
        view = await _find(request)
    except ApiError as error:
        if error.code != "not_found":
            raise
        view = None
    if view is None or view.terminal:
        return JSONResponse(StopTaskResponse("do_nothing", "Task not found or already completed."))
    await request.state["services"].head.cancel(view.request_id, request.state["owner"])
    return JSONResponse(StopTaskResponse("success", "Task stopped successfully."))


@operation({200: StopTaskResponse}, (503,))
async def delete_running_tasks(request: ApiRequest) -> JSONResponse:
    """Stop all tasks of the client that have not ended."""
    head, owner = request.state["services"].head, request.state["owner"]
    ids, has_more = list[str](), True
    while has_more:
        found = await head.list_requests(ListRequests(owner, ids[-1] if ids else "", LISTED_AT_ONCE, active=True))
        ids += found.request_ids
        has_more = found.has_more
    await gather_found(head.cancel(id_, owner) for id_ in ids)
    return JSONResponse(StopTaskResponse("success", "All tasks stopped successfully."))


@operation({200: QueueStatus}, (503,))
async def get_queue_status(request: ApiRequest) -> JSONResponse:
    """Show what runs and waits."""
    services = request.state["services"]
    return JSONResponse(queue_status(await services.head.cluster(), services.topology.head.max_pending))


@operation({200: ServiceStatus}, (503,))
async def get_service_status(request: ApiRequest) -> JSONResponse:
    """Show what runs and waits, and how many tasks have ended."""
    services = request.state["services"]
    queue = queue_status(cluster := await services.head.cluster(), services.topology.head.max_pending)
    ended = Counter[str]()
    for family in await services.cluster.metrics():
        for sample in family.samples:
            if sample.name == "triptych_requests_total":
                ended[sample.labels["outcome"]] += int(sample.value)
    status = ServiceStatus(
        service_status="busy" if queue.is_processing else "idle",
        current_task=queue.current_task,
        active_tasks=running_tasks(cluster),
        pending_tasks=queue.pending_count,
        queue_size=queue.queue_size,
        total_tasks=queue.active_count + ended.total(),
        completed_tasks=ended["done"],
        failed_tasks=ended["failed"] + ended["timed_out"],
    )
    return JSONResponse(status)


async def _find(request: ApiRequest) -> RequestView:
    """Find the task of the path; raises ApiError 404."""
    task_id, owner = request.path_params["task_id"], request.state["owner"]
    try:
        return await request.state["services"].head.query(request_id_of(owner, task_id), owner)
    except RemoteError as error:
        if error.code != "not_found":
            raise
        raise not_found(f"there is no task {task_id}") from None


def request_id_of(owner: str, task_id: str) -> str:
    """Return the id of the request that a task is.

    A name that the client has chosen never is an id: it could be that of another client's request.
    """
    if _OWN_ID.fullmatch(task_id):
        return task_id
    return "task_" + hashlib.blake2b(f"{owner}/{task_id}".encode(), digest_size=16).hexdigest()


def task_status(view: RequestView, task_id: str) -> TaskStatus:
    """Describe a request as a task."""
    job = view.units[0]
    status = _STATUS.get(State(view.state), "processing")
    began = next((move.at for move in job.history if move.state in _RUNNING), view.created_at)
    error, error_type = None, ""
    if status == "cancelled":
        error = "Task cancelled by user"
    elif status == "failed":
        error = failure_reason(view) or "no reason is known"
        timed_out = view.state == State.TIMED_OUT
        error_type = "ValueError" if job.at_fault else "TimeoutError" if timed_out else "RuntimeError"
    return TaskStatus(
        task_id=task_id,
        status=status,
        start_time=_iso(began),
        end_time=_iso(view.finished_at) if view.terminal else None,
        error=error,
        error_type=error_type,
        save_result_path=job.artifact.name if job.artifact else None,
    )


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def queue_status(cluster: ClusterView, queue_size: int) -> QueueStatus:
    """Sum up what runs and waits; `queue_size` is `[head] max_pending`."""
    active = sum(cluster.states.values())
    processing = sum(count for state, count in cluster.states.items() if state in _RUNNING)
    return QueueStatus(
        is_processing=processing > 0,
        current_task=next(iter(running_tasks(cluster)), None),
        pending_count=active - processing,
        active_count=active,
        queue_size=queue_size,
        queue_available=max(0, queue_size - active),
    )


def running_tasks(cluster: ClusterView) -> list[str]:
    """Return the ids of the requests that instances have."""
    jobs = [job.partition("/")[0] for instance in cluster.instances for job in instance.running]
    return list(dict.fromkeys(jobs))


def sides_of(shape: tuple[int, int], inputs: Mapping[str, Input], names: FieldNames) -> dict[str, int]:
    """Return height and width of `target_shape`, and have errors name that."""
    if "height" in inputs or "width" in inputs:
        raise field_error("target_shape", "says the same as height and width: give the one or the others")
    sides = dict(zip(("height", "width"), shape, strict=True))
    for side, value in sides.items():
        names.learn(side, "target_shape", f"the {side} in target_shape, {value},")
    return sides


def size_of_ratio(
    ratio: str, inputs: Mapping[str, Input], shape: tuple[int, int] | None, description: ModelDescription
) -> dict[str, int]:
    """Return height and width of a ratio, with about as many pixels as by default, that the model can make.

    Nothing where another field says the size, or no default is known.
    """
    match = _RATIO.fullmatch(ratio)
    if ratio and match is None:
        raise field_error("aspect_ratio", "must be width and height as in 16:9")
    defaults = {parameter.name: parameter.default for parameter in description.parameters} | description.defaults
    height, width = defaults.get("height"), defaults.get("width")
    if match is None or shape or {"height", "width", "image"} & inputs.keys():
        return {}
    if not (isinstance(height, int) and isinstance(width, int)):
        return {}
    wanted = (height * width * int(match[1]) / int(match[2])) ** 0.5
    sides = {"height": height * width / wanted, "width": wanted}
    return {side: nearest_side(value, description.ranges.get(side, ())) for side, value in sides.items()}


def nearest_side(value: float, limits: tuple[float, ...]) -> int:
    """Return the number of pixels next to `value` within limits: (lowest, highest) or (lowest, highest, step)."""
    least, most, step = (*limits, 1.0)[:3] if limits else (_SIDE_STEP, MAX_SIDE, _SIDE_STEP)
    return int(min(max(round(value / step), -(-least // step)), most // step) * step)


def _route(path: str, endpoint: Endpoint, method: str, *others: str) -> list[Route]:
    """Make the routes of a path, and of others that lead to the same and are not in the OpenAPI document."""
    more = [Route(other, endpoint, methods=[method], include_in_schema=False) for other in others]
    return [Route(path, endpoint, methods=[method]), *more]


_TASKS: Final = by_method(get=list_tasks, post=create_task)
LIGHTX2V_ROUTES: Final = [
    # LightX2V's paths end in a slash where they have no id.
    *_route("/v1/tasks/image/", create_image_task, "POST", "/v1/tasks/image", "/v1/tasks/image/form"),
    *_route("/v1/tasks/image/sync", create_image_task_sync, "POST"),
    *_route("/v1/tasks/video/", create_video_task, "POST", "/v1/tasks/video", "/v1/tasks/video/form"),
    Route("/v1/tasks/", _TASKS),
    Route("/v1/tasks", _TASKS, include_in_schema=False),
    *_route("/v1/tasks/queue/status", get_queue_status, "GET"),
    *_route("/v1/service/status", get_service_status, "GET"),
    *_route("/v1/tasks/all/running", delete_running_tasks, "DELETE"),
    *_route("/v1/tasks/{task_id}/status", get_task_status, "GET"),
    *_route("/v1/tasks/{task_id}/result", get_task_result, "GET"),
    *_route("/v1/tasks/{task_id}", delete_task, "DELETE"),
    Route("/v1/files/download/{name}", get_file, methods=["GET"], include_in_schema=False),
]
