"""GET /live, /ready and /health: what probes and people ask first."""

from __future__ import annotations

from starlette.requests import Request

from api.cluster import Cluster
from api.encoding import JSONResponse

DOWN = {"down", "backoff", "failed", "gave_up", "stopped"}


async def live(_: Request) -> JSONResponse:
    """Answer at all; says nothing of the other processes."""
    return JSONResponse({"status": "live"})


async def ready(request: Request) -> JSONResponse:
    """Answer 200 when pictures can be made and nothing was given up, else 503 with the reasons."""
    observer: Cluster = request.app.state.cluster
    readiness = await observer.readiness()
    return JSONResponse(
        {
            "status": "ready" if readiness.ready else "not ready",
            "reasons": readiness.reasons,
            "gave_up": readiness.gave_up,
        },
        status_code=200 if readiness.ready else 503,
    )


async def health(request: Request) -> JSONResponse:
    """Sum up: `ok`, `degraded` when pictures are made but an actor is down, `unavailable` with 503."""
    observer: Cluster = request.app.state.cluster
    seen = await observer.observe()
    down = sorted(actor["name"] for actor in seen["actors"] if actor["state"] in DOWN)
    status = "unavailable" if not seen["ready"] else "degraded" if down else "ok"
    head = seen["head"] or {}
    return JSONResponse(
        {
            "status": status,
            "reasons": seen["reasons"],
            "down": down,
            "actors": len(seen["actors"]),
            "units": head.get("states", {}),
            "completed": head.get("completed", 0),
            "average_latency_s": head.get("average_latency_s", 0.0),
        },
        status_code=503 if status == "unavailable" else 200,
    )
