"""GET /live, /ready and /health: for probes."""

from __future__ import annotations

import msgspec
from starlette.requests import Request

from triptych.actors.child_state import DOWN_STATES
from triptych.api.cluster import ClusterObserver
from triptych.api.responses import JSONResponse


class Live(msgspec.Struct):
    """The process answers."""

    status: str = "live"


class Ready(msgspec.Struct):
    """Whether requests are taken, and why not."""

    status: str
    reasons: list[str]
    gave_up: list[str]


class Health(msgspec.Struct):
    """The system in short."""

    status: str
    """ok, degraded or unavailable."""
    reasons: list[str]
    down: list[str]
    """Names of actors."""
    actors: int
    units: dict[str, int]
    """Pictures under way, by state."""
    completed: int
    average_latency_s: float


async def live(_: Request) -> JSONResponse:
    """Answer at all; says nothing of the other processes."""
    return JSONResponse(Live())


async def ready(request: Request) -> JSONResponse:
    """Answer 200 when images can be made and nothing was given up, else 503 with the reasons."""
    probe: ClusterObserver = request.app.state.cluster
    readiness = await probe.readiness()
    status = "ready" if readiness.ready else "not ready"
    content = Ready(status, readiness.reasons, readiness.gave_up)
    return JSONResponse(content, status_code=200 if readiness.ready else 503)


async def health(request: Request) -> JSONResponse:
    """Sum up: `ok`, `degraded` when images are made but an actor is down, `unavailable` with 503."""
    probe: ClusterObserver = request.app.state.cluster
    seen = await probe.snapshot()
    down = sorted(actor["name"] for actor in seen["actors"] if actor["state"] in DOWN_STATES)
    status = "unavailable" if not seen["ready"] else "degraded" if down else "ok"
    head = seen["head"] or {}
    content = Health(
        status,
        seen["reasons"],
        down,
        len(seen["actors"]),
        head.get("states", {}),
        head.get("completed", 0),
        head.get("average_latency_s", 0.0),
    )
    return JSONResponse(content, status_code=503 if status == "unavailable" else 200)
