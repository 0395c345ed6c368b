"""Metrics of a process, in the format of Prometheus.

What counts and what is measured as it happens lives in `REGISTRY`; what is read off an actor when somebody asks comes
from `Actor.metrics`. `MetricsQuery`, which every actor answers, gets both as text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from triptych.actors.runtime.system_messages import ActorStatus

disable_created_metrics()  # type: ignore[no-untyped-call]
REGISTRY: Final = CollectorRegistry()
"""What this process has counted and measured, and its memory and processor time. It begins at zero with each
incarnation, as Prometheus expects."""
ProcessCollector(registry=REGISTRY)


class _Families:
    """Metrics that are there already, as a collector."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = tuple(families)

    def collect(self) -> Iterable[Metric]:
        """Return them."""
        return self._families


def exposition(families: Iterable[Metric]) -> str:
    """Write metrics as text."""
    return generate_latest(_Families(families)).decode()


def actor_metrics(actors: Iterable[ActorStatus]) -> Iterator[Metric]:
    """Yield what is known of every actor."""
    depth = GaugeMetricFamily(
        "triptych_mailbox_depth", "Messages that wait in the mailbox of an actor.", labels=["actor"]
    )
    dead = CounterMetricFamily("triptych_dead_letters", "Messages that an actor did not handle.", labels=["actor"])
    for actor in actors:
        depth.add_metric([actor.name], actor.mailbox_depth)
        dead.add_metric([actor.name], actor.dead_letters)
    yield from (depth, dead)


def merge(texts: Mapping[str, str]) -> list[Metric]:
    """Make one set of metrics of those of several processes, with the label `component`.

    Args:
        texts: What `exposition` has written, by the name of the component.
    """
    merged: dict[str, Metric] = {}
    for component, text in texts.items():
        for family in text_string_to_metric_families(text):
            into = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            into.samples += [
                sample._replace(labels={"component": component, **sample.labels}) for sample in family.samples
            ]
    return [merged[name] for name in sorted(merged)]
