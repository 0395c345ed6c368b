"""GET /v1/cluster, /live, /ready and /health: what the cluster observer has seen, as HTTP answers."""

from __future__ import annotations

import time

import msgspec

from triptych.actors.child_state import DOWN_STATES
from triptych.api.operations import operation
from triptych.api.responses import JSONResponse
from triptych.api.services import ApiRequest

PROBE_AGE_S = 0.5
"""How old the answer to a probe may be: probes need no key, and each would else ask every actor."""


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
    """Active jobs, by state."""
    completed: int
    average_latency_s: float


@operation({200: "Cluster"})
async def get_cluster(request: ApiRequest) -> JSONResponse:
    """Show every actor, pool and dead letter."""
    return JSONResponse(await request.state["services"].cluster.snapshot())


@operation({200: Live})
async def is_live(_: ApiRequest) -> JSONResponse:
    """Say that the API process answers."""
    return JSONResponse(Live())


@operation({200: Ready, 503: Ready})
async def is_ready(request: ApiRequest) -> JSONResponse:
    """Say whether images can be made now; 503 with the reasons where not, or where something was given up."""
    readiness = await request.state["services"].cluster.shared_readiness(time.monotonic() - PROBE_AGE_S)
    status = "ready" if readiness.ready else "not ready"
    content = Ready(status, readiness.reasons, readiness.gave_up)
    return JSONResponse(content, status_code=200 if readiness.ready else 503)


@operation({200: Health, 503: Health})
async def get_health(request: ApiRequest) -> JSONResponse:
    """Sum up the system: ok, degraded where images are made but an actor is down, or unavailable."""
    _, seen = await request.state["services"].cluster.shared_snapshot(time.monotonic() - PROBE_AGE_S)
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
