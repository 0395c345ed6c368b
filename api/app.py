"""The application: its routes, and what they share."""

from __future__ import annotations

import asyncio

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from triptych.actors.topology import Topology
from triptych.api.access import AccessMiddleware
from triptych.api.artifacts import get_artifact
from triptych.api.body import BodyLimiter
from triptych.api.cluster import ClusterObserver, get_cluster
from triptych.api.edits import ImageEdits
from triptych.api.errors import HANDLERS
from triptych.api.head_client import HeadClient
from triptych.api.health import health, live, ready
from triptych.api.images import ImageGenerations
from triptych.api.keys import ApiKeys
from triptych.api.models import get_model, list_models
from triptych.api.openapi import openapi
from triptych.api.request_context import RequestContextMiddleware
from triptych.api.requests import RequestResource
from triptych.api.unsupported import INSTEAD, unsupported
from triptych.api.uploads import UploadService
from triptych.api.videos import VideoResource, Videos, video_content
from triptych.roles.media.artifacts import ArtifactStore
from triptych.roles.media.uploads import UploadStore

ROUTES = [
    Route("/v1/images/generations", ImageGenerations),
    Route("/v1/images/edits", ImageEdits),
    *(Route(path, unsupported(sentence), methods=["POST"]) for path, sentence in INSTEAD.items()),
    Route("/v1/images/{name}", get_artifact),
    Route("/v1/videos", Videos),
    Route("/v1/videos/{video_id}", VideoResource),
    Route("/v1/videos/{video_id}/content", video_content),
    Route("/v1/models", list_models),
    Route("/v1/models/{name:path}", get_model),
    Route("/v1/requests/{request_id}", RequestResource),
    Route("/v1/cluster", get_cluster),
    Route("/live", live),
    Route("/ready", ready),
    Route("/health", health),
    Route("/openapi.json", openapi),
]


def make_app(
    topology: Topology,
    head: HeadClient,
    probe: ClusterObserver,
    uploads: UploadStore,
    stopping: asyncio.Event,
    keys: ApiKeys | None = None,
) -> ASGIApp:
    """Make the ASGI application. Once `stopping` is set, who still waits for images is answered 503."""
    app = Starlette(routes=ROUTES, exception_handlers=HANDLERS)
    app.router.redirect_slashes = False
    app.state.topology = topology
    app.state.head = head
    app.state.cluster = probe
    app.state.artifacts = ArtifactStore(topology.state_dir / "artifacts")
    app.state.uploads = UploadService(uploads)
    app.state.body_limiter = BodyLimiter()
    app.state.stopping = stopping
    return RequestContextMiddleware(AccessMiddleware(app, topology.api, keys))
