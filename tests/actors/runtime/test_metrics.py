from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.parser import text_string_to_metric_families

from triptych.actors.child_state import ChildState
from triptych.actors.runtime.metrics import actor_metrics, exposition, merge
from triptych.actors.runtime.system_messages import ActorStatus


def process(count: int) -> str:
    registry = CollectorRegistry()
    Counter("made", "Things made.", ["kind"], registry=registry).labels('a "b" \\ \n').inc(count)
    Histogram("took_seconds", "Time taken.", buckets=(1,), registry=registry).observe(count)
    return exposition([*registry.collect(), GaugeMetricFamily("size", "Size.", value=count)])


def test_metrics_of_several_processes_are_one_set_with_their_components():
    text = exposition(merge({"denoiser-0": process(1), "denoiser-1": process(2)}))
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {name: family.type for name, family in families.items()} == {
        "made": "counter", "took_seconds": "histogram", "size": "gauge",
    }  # fmt: skip
    made = {sample.labels["component"]: sample for sample in families["made"].samples}
    assert {name: sample.value for name, sample in made.items()} == {"denoiser-0": 1, "denoiser-1": 2}
    assert made["denoiser-0"].labels["kind"] == 'a "b" \\ \n'
    assert text.count("# TYPE made_total counter") == 1
    buckets = [sample for sample in families["took_seconds"].samples if sample.name.endswith("_bucket")]
    assert len(buckets) == 4


def test_what_is_no_exposition_is_an_error():
    with pytest.raises(ValueError, match="float"):
        merge({"denoiser-0": "made_total many\n"})


def test_each_actor_has_the_depth_of_its_mailbox_and_its_dead_letters():
    status = ActorStatus(
        name="head", kind="head", pid=1, generation=1, state=ChildState.READY, detail="", restarts=0, uptime_s=1.0,
        mailbox_depth=3, mailbox_capacity=4, dead_letters=5, facts={},
    )  # fmt: skip
    samples = [sample for family in actor_metrics([status]) for sample in family.samples]
    assert {sample.name: (sample.labels, sample.value) for sample in samples} == {
        "triptych_mailbox_depth": ({"actor": "head"}, 3),
        "triptych_dead_letters_total": ({"actor": "head"}, 5),
    }
