"""The application: its routes, and what they share."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from triptych.actors.api_keys import ApiKeys
from triptych.actors.topology import Topology
from triptych.api.artifacts import artifact
from triptych.api.body import Intake
from triptych.api.cluster import Cluster, cluster
from triptych.api.context import RequestContext
from triptych.api.edits import Edits
from triptych.api.errors import HANDLERS
from triptych.api.generations import Generations
from triptych.api.guard import Guard
from triptych.api.head import Head
from triptych.api.health import health, live, ready
from triptych.api.models import get_model, list_models
from triptych.api.openapi import openapi
from triptych.api.requests import Requests
from triptych.api.unsupported import INSTEAD, unsupported
from triptych.api.uploads import UploadDesk
from triptych.api.videos import OneVideo, Videos, video_content
from triptych.roles.artifacts import ArtifactStore
from triptych.roles.uploads import UploadStore

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
