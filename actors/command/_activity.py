"""What a system does at the moment, read off its metrics: queues, and rates between two looks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

_REQUESTS: Final = "triptych_requests_total"
_STEPS: Final = "triptych_step_seconds_count"
_BATCHED: Final = "triptych_batch_size_sum"
_BYTES: Final = "triptych_transfer_bytes_total"
_JOBS: Final = "triptych_jobs"
_QUEUED_S: Final = "triptych_queued_seconds"


class Sample(NamedTuple):
    """One row of the metrics, without its value."""

    name: str
    labels: tuple[tuple[str, str], ...]

    def label(self, name: str) -> str:
        """Return the value of a label, "" if it has none of that name."""
        return dict(self.labels).get(name, "")


class Look(NamedTuple):
    """The metrics of a system at one moment."""

    at: float
    """Seconds on a clock that never goes back."""
    values: Mapping[Sample, float]


class Queue(NamedTuple):
    """The jobs of one stage of a model."""

    model: str
    stage: str
    waiting: int
    running: int
    queued_s: float
    """Predicted seconds of computation of those that wait, for one instance."""


class Rates(NamedTuple):
    """How much was done in a second, between two looks."""

    requests: Mapping[str, float]
    """Those that have ended, by outcome: done, failed, timed_out, cancelled."""
    steps: float
    """Denoising steps; those of a batch are one."""
    batch: float
    """Requests that took a step together, in the mean; 0 without steps."""
    nbytes: float
    """Bytes of tensors and files that were transferred."""


def read_look(text: str, at: float) -> Look:
    """Read the answer of `GET /metrics`. Pure."""
    values = {
        Sample(sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return Look(at, values)


def queues(look: Look) -> list[Queue]:
    """Return the queue of each stage of each model, in the order of the metrics. Pure."""
    counts: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for sample, value in look.values.items():
        where = counts[sample.label("model"), sample.label("stage")] if sample.name in (_JOBS, _QUEUED_S) else {}
        where[sample.label("state") if sample.name == _JOBS else _QUEUED_S] = value
    return [
        Queue(model, stage, int(found["waiting"]), int(found["running"]), found[_QUEUED_S])
        for (model, stage), found in counts.items()
    ]


def rates(before: Look, now: Look) -> Rates:
    """Return what was done between two looks, in each second. Pure.

    A counter that is lower than before belongs to a process that was started again, and counts from zero.
    """
    seconds = max(now.at - before.at, 1e-9)
    totals: dict[tuple[str, str], float] = defaultdict(float)
    for sample, value in now.values.items():
        if sample.name in (_REQUESTS, _STEPS, _BATCHED, _BYTES):
            earlier = before.values.get(sample, 0.0)
            totals[sample.name, sample.label("outcome")] += value - earlier if value >= earlier else value
    requests = {outcome: total / seconds for (name, outcome), total in totals.items() if name == _REQUESTS}
    steps = totals[_STEPS, ""]
    return Rates(
        requests,
        steps / seconds,
        totals[_BATCHED, ""] / steps if steps else 0.0,
        totals[_BYTES, ""] / seconds,
    )
