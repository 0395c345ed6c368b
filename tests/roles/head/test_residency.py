"""Who sleeps and who is woken."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.roles.factories import KINDS, SIGNATURE, registration, request
from triptych.actors import load_topology
from triptych.roles.head.effects import SetInstanceAwake
from triptych.roles.head.residency import (
    RETRY_S,
    ResidencyManager,
    ResidencyPlan,
    ResidencyState,
    ResidentModel,
    plan_residency,
)
from triptych.roles.head.served_models import served_models_of
from triptych.roles.messages.stages import InstanceWakeChanged

BUDGET = {"cpu": 10}


def model(
    name: str, gib: int = 6, *, on: str = "cpu", awake: bool = False, **more: float | bool | None
) -> ResidentModel:
    return ResidentModel(name, {on: gib}, awake=awake, **more)  # type: ignore[arg-type]


AWAKE = model("a", awake=True, used=2.0, awake_s=99.0)


@pytest.mark.parametrize(
    ("residents", "awake", "drained"),
    [
        ([AWAKE, model("b")], {"a"}, set()),
        ([AWAKE, model("b", 4, waiting_s=0.0)], {"a", "b"}, set()),
        ([AWAKE, model("b", waiting_s=0.0)], {"b"}, set()),
        ([AWAKE, model("b", on="cuda:0", waiting_s=0.0)], {"a", "b"}, set()),
        ([AWAKE, model("b", 99, on="cuda:0", waiting_s=0.0)], {"a", "b"}, set()),
        ([AWAKE, model("b", 99, waiting_s=0.0)], {"b"}, set()),
        ([model("a", awake=True, pinned=True), model("b", waiting_s=0.0)], {"a", "b"}, set()),
        (
            [model("a", 4, awake=True, used=2.0), model("b", 4, awake=True, used=1.0), model("c", 4, waiting_s=0.0)],
            {"a", "c"},
            set(),
        ),
        ([model("a", awake=True, begun=True, awake_s=9.0), model("b", waiting_s=8.0)], {"a"}, set()),
        ([model("a", awake=True, begun=True, awake_s=30.0), model("b", waiting_s=0.0)], {"a"}, {"a"}),
        ([model("a", awake=True, waiting_s=5.0, awake_s=30.0), model("b", waiting_s=0.0)], {"b"}, set()),
        (
            [AWAKE, model("b", waiting_s=1.0), model("c", waiting_s=2.0), model("d", 1, waiting_s=0.0)],
            {"c"},
            set(),
        ),
        ([model("a", awake=True, sleep_requested=True), model("b")], set(), set()),
        ([model("a", awake=True, sleep_requested=True, begun=True), model("b")], {"a"}, set()),
        ([model("a", awake=True, used=1.0), model("b", awake=True, used=2.0)], {"b"}, set()),
        ([model("a", awake=True, used=1.0, pinned=True), model("b", awake=True, used=2.0)], {"a"}, set()),
        ([model("a", awake=True, begun=True), model("b", awake=True, waiting_s=1.0)], {"a", "b"}, set()),
        ([model("a", begun=True, waiting_s=9.0), model("b", awake=True, waiting_s=1.0)], {"a"}, set()),
        ([model("a", 99, awake=True)], {"a"}, set()),
        ([model("a", 6, waiting_s=0.0), model("b", 6, waiting_s=0.0), model("c", 3, waiting_s=0.0)], {"a"}, set()),
    ],
    ids=[
        "without a request nothing changes",
        "where both fit both are awake",
        "who has no request sleeps",
        "another device has free memory",
        "of a device without a bound there is enough",
        "what fits nowhere is woken alone",
        "who never sleeps stays, and the other is woken beside it",
        "the least recently used sleeps",
        "who has not had its turn goes on",
        "who has had its turn finishes what is under way",
        "who has had its turn and nothing under way sleeps, requests or not",
        "who waits longest is first, and nobody goes before it",
        "who is dismissed sleeps",
        "who is dismissed finishes what is under way",
        "where two take too much together one sleeps",
        "where two take too much together and one never sleeps the other does",
        "where two take too much together and have work they finish",
        "who has begun jobs just as it was to sleep is woken first",
        "one that takes too much alone stays",
        "at the start the first is woken",
    ],
)
def test_which_models_are_awake(residents: list[ResidentModel], awake: set[str], drained: set[str]) -> None:
    assert plan_residency(residents, BUDGET, turn_s=10.0) == ResidencyPlan(awake, drained)


TWO = """
[memory]
host = "1KiB"
turn_s = 10
[[models]]
name = "a"
path = "a"
[[models.roles]]
kind = "encoder"
[[models.roles]]
kind = "denoiser"
[[models.roles]]
kind = "decoder"
[[models]]
name = "b"
path = "b"
[[models.roles]]
kind = "monolithic"
"""


def test_a_model_that_cannot_be_woken_does_not_keep_others_from_being(tmp_path: Path) -> None:
    file = tmp_path / "two.toml"
    file.write_text(TWO)
    models = served_models_of(load_topology(file))
    residency = ResidencyManager(load_topology(file), models)
    for served in models.all:
        served.weight_file_bytes = 1 << 20

    def joins(name: str) -> None:
        message = replace(registration(name), kind=name.split("-")[1], awake=False)
        models.scheduler_of(name).register(message, 0.0)

    def told(at: float, trouble: str = "") -> set[tuple[str, bool]]:
        residency.update(at)
        effects = [effect for make_scheduler in models.schedulers for effect in make_scheduler.take_effects()]
        turned = {(effect.instance, effect.awake) for effect in effects if isinstance(effect, SetInstanceAwake)}
        for name, awake in turned:
            report = InstanceWakeChanged(awake and not trouble, SIGNATURE, 1 << 20, 0.1, trouble)
            models.scheduler_of(name).wake_changed(name, 1, report)
        return turned

    a, b = models.all
    for name in ("a-encoder-0", "a-denoiser-0", "b-monolithic-0"):
        joins(name)
    assert told(0.0) == {("b-monolithic-0", True)}, "the decoder of the other is not there"
    assert (residency.state(a), residency.state(b)) == (ResidencyState.STARTING, ResidencyState.LOADED)
    joins("a-decoder-0")
    assert told(1.0) == {("b-monolithic-0", False)}
    others = {(f"a-{kind}-0", True) for kind in KINDS}
    assert told(1.1, "out of memory") == others
    assert told(2.0, "out of memory") == set(), "it is tried again after a while"
    assert told(1.1 + RETRY_S, "out of memory") == others
    b.scheduler.accept(request(), 8.0)
    assert told(10.9) == set()
    assert told(11.2) == {("b-monolithic-0", True)}, "it has had its turn"


def test_the_memory_of_each_host_is_its_own(tmp_path: Path) -> None:
    file = tmp_path / "two.toml"
    hosts = '[[hosts]]\nname = "h"\naddress = "10.0.0.1"\n[[hosts]]\nname = "i"\naddress = "10.0.0.2"\n'
    on = {kind: f'kind = "{kind}"\nhost = "{"i" if kind == "monolithic" else "h"}"' for kind in (*KINDS, "monolithic")}
    text = TWO.replace('"1KiB"', '"3MiB"')
    for kind, keys in on.items():
        text = text.replace(f'kind = "{kind}"', keys)
    file.write_text(f'{hosts}[head]\nhost = "h"\n{text}')
    models = served_models_of(load_topology(file))
    residency = ResidencyManager(load_topology(file), models)
    for served in models.all:
        served.weight_file_bytes = 3 << 20
    for name in ("a-encoder-0", "a-denoiser-0", "a-decoder-0", "b-monolithic-0"):
        message = replace(registration(name), kind=name.split("-")[1], awake=False)
        models.scheduler_of(name).register(message, 0.0)
    residency.update(0.0)
    assert all(residency._decided.values()), "both have what they need: 3 MiB on each host"
