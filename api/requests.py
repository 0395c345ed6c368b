"""GET and DELETE /v1/requests/{id}."""

from __future__ import annotations

from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request

from api.artifacts import artifact_url
from api.encoding import JSONResponse, plain
from api.head import Head
from roles.messages.requests import CancelRequest, QueryRequest, RequestView


def request_object(request: Request, view: RequestView) -> dict[str, object]:
    """Show the view by field name, its artifacts with their URLs."""
    fields: dict[str, object] = plain(view)
    del fields["request_id"]
    units = []
    for unit in view.units:
        shown = plain(unit)
        if unit.artifact is not None:
            shown["artifact"]["url"] = artifact_url(request, unit.artifact.name)
        units.append(shown)
    return {"id": view.request_id, "object": "request", **fields, "units": units}


class Requests(HTTPEndpoint):
    """One request: its state and its history."""

    async def get(self, request: Request) -> JSONResponse:
        """Answer with the request as it is now."""
        head: Head = request.app.state.head
        view = await head.ask(QueryRequest(request.path_params["request_id"]), RequestView)
        return JSONResponse(request_object(request, view))

    async def delete(self, request: Request) -> JSONResponse:
        """Cancel it; one that is terminal stays as it is."""
        head: Head = request.app.state.head
        view = await head.ask(CancelRequest(request.path_params["request_id"]), RequestView)
        return JSONResponse(request_object(request, view))
