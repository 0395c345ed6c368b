"""The URLs that answers contain."""

from __future__ import annotations

from triptych.api.services import ApiRequest


def join_url(site: str, path: str, name: str = "") -> str:
    """Return the URL of a path, or of a name below it, of a site."""
    return site.rstrip("/") + path + name


def url_of(request: ApiRequest, path: str) -> str:
    """Return the URL of a path; it starts with `[api] public_url`, else where the client connected."""
    public_url = request.state["services"].topology.api.public_url
    return join_url(public_url or f"{request.scope['scheme']}://{request.headers['host']}", path)


def request_url(request: ApiRequest, request_id: str) -> str:
    """Return the URL of a request."""
    return url_of(request, f"/v1/requests/{request_id}")


def artifact_url(request: ApiRequest, name: str) -> str:
    """Return the URL of an artifact."""
    return url_of(request, f"/v1/images/{name}")
