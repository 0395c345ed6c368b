"""Where clients find things: URLs that start where the client came in, or with `[api] public_url`."""

from __future__ import annotations

from starlette.requests import Request

from triptych.actors.topology import Topology


def url_of(request: Request, path: str) -> str:
    """Return the URL of a path for the client that made this request."""
    topology: Topology = request.app.state.topology
    return (topology.api.public_url or str(request.base_url)).rstrip("/") + path


def request_url(request: Request, request_id: str) -> str:
    """Return the URL of a request."""
    return url_of(request, f"/v1/requests/{request_id}")


def artifact_url(request: Request, name: str) -> str:
    """Return the URL of an artifact."""
    return url_of(request, f"/v1/images/{name}")
