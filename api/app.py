"""The application: its routes."""

from __future__ import annotations

from typing import Final

from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from triptych.api.access import AccessMiddleware
from triptych.api.artifacts import get_file
from triptych.api.cluster import get_cluster, get_health, is_live, is_ready
from triptych.api.cluster_events import get_cluster_events
from triptych.api.discovery import get_model_info, get_server_info, get_version
from triptych.api.exception_handlers import EXCEPTION_HANDLERS
from triptych.api.images import create_image, create_image_edit, create_image_variation
from triptych.api.keys import ApiKeys
from triptych.api.lightx2v import LIGHTX2V_ROUTES
from triptych.api.metrics import get_metrics
from triptych.api.models import get_model, list_models
from triptych.api.openapi import get_openapi
from triptych.api.operations import by_method
from triptych.api.page import FILES, get_page_file
from triptych.api.request_context import RequestContextMiddleware
from triptych.api.request_events import get_request_events
from triptych.api.request_list import list_requests
from triptych.api.requests import delete_request, get_request
from triptych.api.services import Services
from triptych.api.videos import (
    cancel_video,
    create_video,
    delete_video,
    get_video,
    get_video_content,
    list_videos,
    remix_video,
)

ROUTES: Final = [
    # With `methods=["POST"]` a GET would go on to /v1/images/{name}.
    Route("/v1/images/generations", by_method(post=create_image)),
    Route("/v1/images/edits", by_method(post=create_image_edit)),
    Route("/v1/images/variations", by_method(post=create_image_variation)),
    Route("/v1/images/{name}", get_file),
    Route("/v1/videos", by_method(get=list_videos, post=create_video)),
    Route("/v1/videos/{video_id}", by_method(get=get_video, delete=delete_video)),
    Route("/v1/videos/{video_id}/cancel", by_method(post=cancel_video)),
    Route("/v1/videos/{video_id}/content", get_video_content),
    Route("/v1/videos/{video_id}/remix", by_method(post=remix_video)),
    Route("/v1/models", list_models),
    Route("/v1/models/{name:path}", get_model),
    Route("/v1/requests", list_requests),
    Route("/v1/requests/{request_id}", by_method(get=get_request, delete=delete_request)),
    Route("/v1/requests/{request_id}/events", get_request_events),
    *LIGHTX2V_ROUTES,
    Route("/v1/cluster", get_cluster),
    Route("/v1/cluster/events", get_cluster_events),
    Route("/metrics", get_metrics),
    Route("/live", is_live),
    Route("/ready", is_ready),
    Route("/health", get_health),
    Route("/version", get_version),
    Route("/server_info", get_server_info),
    Route("/model_info", get_model_info),
    Route("/openapi.json", get_openapi, include_in_schema=False),
    *(Route(path, get_page_file, include_in_schema=False) for path in FILES),
]


def make_app(services: Services, keys: ApiKeys | None = None) -> ASGIApp:
    """Make the ASGI application; where there are `keys`, requests need one."""
    app = Starlette(routes=ROUTES, exception_handlers=EXCEPTION_HANDLERS)
    app.router.redirect_slashes = False
    return RequestContextMiddleware(AccessMiddleware(app, services.topology.api, keys), services)
