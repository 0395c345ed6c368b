"""GET and DELETE /v1/requests/{id}."""

from __future__ import annotations

import json

import msgspec
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request

from triptych.api.errors import not_found
from triptych.api.head_client import HeadClient
from triptych.api.responses import JSONResponse, to_builtins
from triptych.api.urls import artifact_url
from triptych.roles.messages.common import Images, Input, Json, Numbers, Options, Tensors
from triptych.roles.messages.requests import CancelRequest, DeleteRequest, QueryRequest, RequestDeleted, RequestView


def request_object(request: Request, view: RequestView) -> dict[str, object]:
    """Show the view by field name, its artifacts with their URLs."""
    fields: dict[str, object] = to_builtins(view)
    del fields["request_id"]
    fields["inputs"] = {name: input_view(value) for name, value in view.inputs.items()}
    units = []
    for job in view.units:
        row = to_builtins(job)
        if job.artifact is not None:
            row["artifact"]["url"] = artifact_url(request, job.artifact.name)
        units.append(row)
    return {"id": view.request_id, "object": "request", **fields, "units": units}


def input_view(value: Input) -> object:
    """Show an input: images by name and size, numbers as a list."""
    match value:
        case Images(files):
            return [{"name": file.name, "bytes": file.nbytes} for file in files]
        case Tensors(file, names):
            return {"name": file.name, "bytes": file.nbytes, "tensors": list(names)}
        case Numbers(values):
            return list(values)
        case Options(options):
            return options
        case Json(text):
            return json.loads(text)
        case _:
            return value


class Deleted(msgspec.Struct):
    """What is left of a request or a video."""

    id: str
    object: str
    """What it was, and `.deleted`."""
    deleted: bool = True


async def delete(request: Request, request_id: str) -> bool:
    """Have the head remove a request with its prompt and its files; returns whether there was one."""
    head: HeadClient = request.app.state.head
    return (await head.ask(DeleteRequest(request_id, request.state.owner), RequestDeleted)).existed


class RequestResource(HTTPEndpoint):
    """One request: its state and its history."""

    async def get(self, request: Request) -> JSONResponse:
        """Answer with the request as it is now."""
        head: HeadClient = request.app.state.head
        view = await head.ask(QueryRequest(request.path_params["request_id"], request.state.owner), RequestView)
        return JSONResponse(request_object(request, view))

    async def delete(self, request: Request) -> JSONResponse:
        """Cancel one that is active; remove one that has ended, with its prompt and its files."""
        head: HeadClient = request.app.state.head
        id_, owner = request.path_params["request_id"], request.state.owner
        view = await head.ask(QueryRequest(id_, owner), RequestView)
        if not view.terminal:
            view = await head.ask(CancelRequest(id_, owner=owner), RequestView)
            return JSONResponse(request_object(request, view))
        if not await delete(request, id_):
            raise not_found(f"there is no request {id_}")
        return JSONResponse(Deleted(id_, "request.deleted"))
