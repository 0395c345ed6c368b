"""The application: its routes, and what they share."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from actors.api_keys import ApiKeys
from actors.topology import Topology
from api.artifacts import artifact
from api.body import Intake
from api.cluster import Cluster, cluster
from api.context import RequestContext
from api.edits import Edits
from api.errors import HANDLERS
from api.generations import Generations
from api.guard import Guard
from api.head import Head
from api.health import health, live, ready
from api.models import get_model, list_models
from api.openapi import openapi
from api.requests import Requests
from api.unsupported import INSTEAD, unsupported
from api.uploads import UploadDesk
from api.videos import OneVideo, Videos, video_content
from roles.artifacts import ArtifactStore
from roles.uploads import UploadStore

ROUTES = [
    Route("/v1/images/generations", Generations),
    Route("/v1/images/edits", Edits),
    *(Route(path, unsupported(sentence), methods=["POST"]) for path, sentence in INSTEAD.items()),
    Route("/v1/images/{name}", artifact),
    Route("/v1/videos", Videos),
    Route("/v1/videos/{video_id}", OneVideo),
    Route("/v1/videos/{video_id}/content", video_content),
    Route("/v1/models", list_models),
    Route("/v1/models/{name:path}", get_model),
    Route("/v1/requests/{request_id}", Requests),
    Route("/v1/cluster", cluster),
    Route("/live", live),
    Route("/ready", ready),
    Route("/health", health),
    Route("/openapi.json", openapi),
]


def make_app(
    topology: Topology,
    head: Head,
    observer: Cluster,
    uploads: UploadStore,
    stopping: asyncio.Event,
    keys: ApiKeys | None = None,
) -> ASGIApp:
    """Make the ASGI application. Once `stopping` is set, who still waits for pictures is answered 503."""
    app = Starlette(routes=ROUTES, exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    app.state.topology = topology
    app.state.head = head
    app.state.cluster = observer
    app.state.artifacts = ArtifactStore(topology.state_dir / "artifacts")
    app.state.uploads = UploadDesk(uploads)
    app.state.intake = Intake()
    app.state.stopping = stopping
    return RequestContext(Guard(app, topology.api, keys))
