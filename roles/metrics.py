"""What the roles measure, as Prometheus' counters and histograms: of spans as they end, of requests when they have."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Histogram

from triptych.actors.runtime.metrics import REGISTRY

_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_TRANSFER_SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

STEP_SECONDS: Final = Histogram(
    "triptych_step_seconds",
    "Seconds of one denoising step, of one request or a batch.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
BATCH_SIZE: Final = Histogram(
    "triptych_batch_size",
    "Requests that took a denoising step together.",
    buckets=(1, 2, 4, 8, 16, 32),
    registry=REGISTRY,
)
INSTANCE_SECONDS: Final = Histogram(
    "triptych_instance_stage_seconds",
    "Seconds from the begin of a stage on an instance to its end, turns of other requests included.",
    ["stage"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
TRANSFER_SECONDS: Final = Histogram(
    "triptych_transfer_seconds",
    "Seconds of a transfer of tensors or a file: store, load, fetch, save, checkpoint or preview.",
    ["transfer"],
    buckets=_TRANSFER_SECONDS,
    registry=REGISTRY,
)
TRANSFER_BYTES: Final = Counter("triptych_transfer_bytes", "Bytes of those transfers.", ["transfer"], registry=REGISTRY)
TRANSFER_FAILURES: Final = Counter(
    "triptych_transfer_failures", "Transfers that failed or were cancelled.", ["transfer"], registry=REGISTRY
)
TRANSFERS: Final = ("store", "load", "fetch", "read", "save", "checkpoint", "preview")
"""What a transfer may be."""

REQUESTS: Final = Counter("triptych_requests", "Requests that have ended.", ["model", "outcome"], registry=REGISTRY)
REQUEST_SECONDS: Final = Histogram(
    "triptych_request_seconds", "Seconds from acceptance to the result.", ["model"], buckets=_SECONDS, registry=REGISTRY
)
WAIT_SECONDS: Final = Histogram(
    "triptych_stage_wait_seconds",
    "Seconds that a job waited for an instance.",
    ["model", "stage"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
STAGE_SECONDS: Final = Histogram(
    "triptych_stage_seconds",
    "Seconds of the computation of a stage, turns of other requests included.",
    ["model", "stage"],
    buckets=_SECONDS,
    registry=REGISTRY,
)
WEBHOOKS: Final = Counter(
    "triptych_webhooks", "Attempts to send a webhook: delivered, failed or given_up.", ["outcome"], registry=REGISTRY
)
RECOVERY_SECONDS: Final = Histogram(
    "triptych_recovery_seconds",
    "Seconds from the loss of a stage, or of its input, to its next run.",
    ["model", "stage"],
    buckets=_SECONDS,
    registry=REGISTRY,
)


def observe_span(track: str, name: str, seconds: float, attempts: int, nbytes: int, *, failed: bool) -> None:
    """Count what a process has done, as the timeline records it (`roles.timeline.Timeline.span`)."""
    if track == "stage":
        INSTANCE_SECONDS.labels(name).observe(seconds)
    elif track == "compute" and name == "step":
        STEP_SECONDS.observe(seconds)
        BATCH_SIZE.observe(attempts)
    elif track == "transfer" and failed:
        TRANSFER_FAILURES.labels(name).inc()
    elif track == "transfer":
        TRANSFER_SECONDS.labels(name).observe(seconds)
        TRANSFER_BYTES.labels(name).inc(nbytes)
