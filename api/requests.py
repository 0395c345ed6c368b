"""GET and DELETE /v1/requests/{id}."""

from __future__ import annotations

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request

from api.encoding import JSONResponse, plain
from api.head import Head
from api.links import artifact_url
from roles.messages.requests import CancelRequest, QueryRequest, RequestView
from roles.messages.work import Input, Numbers, Pictures


def request_object(request: Request, view: RequestView) -> dict[str, object]:
    """Show the view by field name, its artifacts with their URLs."""
    fields: dict[str, object] = plain(view)
    del fields["request_id"]
    fields["inputs"] = {name: shown(value) for name, value in view.inputs.items()}
    units = []
    for unit in view.units:
        row = plain(unit)
        if unit.artifact is not None:
            row["artifact"]["url"] = artifact_url(request, unit.artifact.name)
        units.append(row)
    return {"id": view.request_id, "object": "request", **fields, "units": units}


def shown(value: Input) -> object:
    """Show an input: pictures by name and size, numbers as a list."""
    match value:
        case Pictures(files):
            return [{"name": file.name, "bytes": file.nbytes} for file in files]
        case Numbers(values):
            return list(values)
        case _:
            return value


class Requests(HTTPEndpoint):
    """One request: its state and its history."""

    async def get(self, request: Request) -> JSONResponse:
        """Answer with the request as it is now."""
        head: Head = request.app.state.head
        view = await head.ask(QueryRequest(request.path_params["request_id"], request.state.owner), RequestView)
        return JSONResponse(request_object(request, view))

    async def delete(self, request: Request) -> JSONResponse:
        """Cancel it; one that is terminal stays as it is."""
        head: Head = request.app.state.head
        view = await head.ask(CancelRequest(request.path_params["request_id"], owner=request.state.owner), RequestView)
        return JSONResponse(request_object(request, view))
