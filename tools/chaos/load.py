"""The clients: they send requests, and send them again with the same key when a connection breaks."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import time
from dataclasses import dataclass, field
from typing import Any

import httpx

from triptych.tools.chaos.plan import ImageCase, PlannedRequest
from triptych.tools.chaos.target import Target

PAUSE_S = 0.1
IN_FLIGHT = 64
"""Most active requests; further ones wait, so that the load is bounded."""


@dataclass(slots=True)
class Outcome:
    """What one client observed."""

    planned: PlannedRequest
    status: int = 0
    """HTTP status of the final answer, 0 if there was none."""
    request_ids: set[str] = field(default_factory=set)
    """Every id that it received; more than one is a duplicate request."""
    digest: str = ""
    """SHA-256 of the image's bytes."""
    error: str = ""
    retries: int = 0
    began: float = 0.0
    """Monotonic seconds, as `ended`."""
    ended: float = 0.0
    final_view: dict[str, Any] = field(default_factory=dict)
    """`GET /v1/requests/{id}` at the end."""


def request_body(image: ImageCase) -> dict[str, object]:
    """Return the JSON body of a request for an image."""
    size = f"{image.side}x{image.side}"
    return {"prompt": image.prompt, "seed": image.seed, "num_inference_steps": image.steps, "size": size}


class LoadGenerator:
    """Sends requests to a cluster."""

    def __init__(self, cluster: Target, key: str, patience_s: float) -> None:
        self._key = key
        self._patience_s = patience_s
        self._in_flight = asyncio.Semaphore(IN_FLIGHT)
        self._http = cluster.http_client(httpx.Timeout(patience_s, connect=5.0))

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def ask(self, planned: PlannedRequest) -> Outcome:
        """Send a request until there is a final answer or the time is over."""
        outcome = Outcome(planned)
        async with self._in_flight:
            outcome.began = time.monotonic()
            while time.monotonic() - outcome.began < self._patience_s:
                answer = await self._post(outcome)
                if answer is not None:
                    _read(answer, outcome)
                    break
                outcome.retries += 1
                await asyncio.sleep(PAUSE_S)
            outcome.ended = time.monotonic()
        return outcome

    async def fetch_final_views(self, outcomes: list[Outcome]) -> None:
        """Fetch the end of each accepted request."""
        for outcome in outcomes:
            for request_id in outcome.request_ids:
                answer = await self._http.get(f"/v1/requests/{request_id}")
                outcome.final_view = answer.json() if answer.is_success else {}

    async def _post(self, outcome: Outcome) -> httpx.Response | None:
        planned = outcome.planned
        body = request_body(planned.image) | {
            "priority": planned.priority,
            "deadline_s": planned.deadline_s,
            "partial_images": planned.partial_images,
        }
        headers = {"Idempotency-Key": f"{self._key}-{planned.number}"}
        try:
            answer = await self._http.post("/v1/images/generations", json=body, headers=headers)
        except httpx.TransportError as error:  # the API may just have been killed: ask again
            outcome.error = repr(error)
            return None
        if answer.status_code in (429, 503):
            outcome.error = answer.text
            return None
        return answer


def _read(answer: httpx.Response, outcome: Outcome) -> None:
    outcome.status = answer.status_code
    body = answer.json()
    request_id = body.get("id") or answer.headers.get("x-request-id", "")
    if request_id:
        outcome.request_ids.add(request_id)
    if answer.is_success:
        outcome.error = ""
        outcome.digest = hashlib.sha256(base64.b64decode(body["data"][0]["b64_json"])).hexdigest()
    else:
        outcome.error = str(body.get("error", {}).get("message", ""))
