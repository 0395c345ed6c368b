"""What endpoints share, and the type of the request that they get."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TypeAlias, TypedDict

from starlette.requests import Request

from triptych.actors.topology import Topology
from triptych.api.body_limiter import BodyLimiter
from triptych.api.cluster_observer import ClusterObserver
from triptych.api.head_client import HeadClient
from triptych.api.uploads import UploadService
from triptych.api.video_variants import VideoVariants
from triptych.api.webhook_keys import WebhookKeys
from triptych.roles.media.artifacts import ArtifactStore
from triptych.roles.trace_exporter import TraceExporter


@dataclass(frozen=True)
class Services:
    """Everything that endpoints use; one for each application."""

    topology: Topology
    head: HeadClient
    cluster: ClusterObserver
    artifacts: ArtifactStore
    uploads: UploadService
    variants: VideoVariants
    body_limiter: BodyLimiter
    stopping: asyncio.Event
    """Set once the server stops: requests that still wait for images are answered 503."""
    webhook_keys: WebhookKeys = field(default_factory=lambda: WebhookKeys({}))
    """They sign webhooks."""
    exporter: TraceExporter | None = None
    """Of the spans of this process; None without traces."""


class RequestState(TypedDict):
    """`request.state`, filled in by the middleware."""

    services: Services
    request_id: str
    """Unique, and the id that the head gets for a new request."""
    owner: str
    """Name of the API key; "" without keys."""
    max_priority: int
    """The highest priority that the client may give a request."""


ApiRequest: TypeAlias = Request[RequestState]
