"""Who sleeps and who is woken."""

from __future__ import annotations

import pytest

from roles.residency import Plan, Resident, plan

BUDGET = {"cpu": 10}


def model(name: str, gib: int = 6, *, on: str = "cpu", awake: bool = False, **more: float | bool | None) -> Resident:
    return Resident(name, {on: gib}, awake=awake, **more)  # type: ignore[arg-type]


AWAKE = model("a", awake=True, used=2.0, awake_s=99.0)


@pytest.mark.parametrize(
    ("residents", "awake", "drained"),
    [
        ([AWAKE, model("b")], {"a"}, set()),
        ([AWAKE, model("b", 4, waits_s=0.0)], {"a", "b"}, set()),
        ([AWAKE, model("b", waits_s=0.0)], {"b"}, set()),
        ([AWAKE, model("b", on="cuda:0", waits_s=0.0)], {"a", "b"}, set()),
        ([AWAKE, model("b", 99, on="cuda:0", waits_s=0.0)], {"a", "b"}, set()),
        ([AWAKE, model("b", 99, waits_s=0.0)], {"b"}, set()),
        ([model("a", awake=True, stays=True), model("b", waits_s=0.0)], {"a", "b"}, set()),
        (
            [model("a", 4, awake=True, used=2.0), model("b", 4, awake=True, used=1.0), model("c", 4, waits_s=0.0)],
            {"a", "c"},
            set(),
        ),
        ([model("a", awake=True, begun=True, awake_s=9.0), model("b", waits_s=8.0)], {"a"}, set()),
        ([model("a", awake=True, begun=True, awake_s=30.0), model("b", waits_s=0.0)], {"a"}, {"a"}),
        ([model("a", awake=True, waits_s=5.0, awake_s=30.0), model("b", waits_s=0.0)], {"b"}, set()),
        (
            [AWAKE, model("b", waits_s=1.0), model("c", waits_s=2.0), model("d", 1, waits_s=0.0)],
            {"c"},
            set(),
        ),
        ([model("a", awake=True, dismissed=True), model("b")], set(), set()),
        ([model("a", awake=True, dismissed=True, begun=True), model("b")], {"a"}, set()),
        ([model("a", awake=True, used=1.0), model("b", awake=True, used=2.0)], {"b"}, set()),
        ([model("a", awake=True, used=1.0, stays=True), model("b", awake=True, used=2.0)], {"a"}, set()),
        ([model("a", awake=True, begun=True), model("b", awake=True, waits_s=1.0)], {"a", "b"}, set()),
        ([model("a", 99, awake=True)], {"a"}, set()),
        ([model("a", 6, waits_s=0.0), model("b", 6, waits_s=0.0), model("c", 3, waits_s=0.0)], {"a"}, set()),
    ],
    ids=[
        "without a request nothing changes",
        "where there is room both are awake",
        "who has no request sleeps",
        "another device has room",
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
        "one that takes too much alone stays",
        "at the start the first is woken",
    ],
)
def test_who_is_awake(residents: list[Resident], awake: set[str], drained: set[str]) -> None:
    assert plan(residents, BUDGET, turn_s=10.0) == Plan(awake, drained)
