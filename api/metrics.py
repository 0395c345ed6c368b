"""GET /metrics: the metrics of every process, in Prometheus' text format."""

from __future__ import annotations

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from starlette.responses import Response

from triptych.actors.runtime.metrics import exposition
from triptych.api.operations import TEXT, operation
from triptych.api.services import ApiRequest


@operation({200: TEXT})
async def get_metrics(request: ApiRequest) -> Response:
    """Return the metrics of every process that answers, each sample with its component."""
    families = await request.state["services"].cluster.metrics()
    return Response(exposition(families), media_type=CONTENT_TYPE_PLAIN_0_0_4)
