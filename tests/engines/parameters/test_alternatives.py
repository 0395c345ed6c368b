"""Classes by name and the options that they take, checked before any of them is imported."""

from __future__ import annotations

import pytest

from triptych.engines.parameters.alternatives import find_class, resolve_classes
from triptych.engines.parameters.schema import Alternative, Option, Parameter, ParameterKind
from triptych.engines.parameters.validation import ParameterError

EULER = Alternative("EulerDiscreteScheduler", (Option("spacing", (ParameterKind.TEXT,), ("leading", "trailing")),))
FLOW = Alternative(
    "FlowMatchEulerDiscreteScheduler",
    (
        Option("shift", (ParameterKind.NUMBER,)),
        Option("indices", (ParameterKind.INTEGER, ParameterKind.NUMBERS), nullable=True),
    ),
)
NAMES = (EULER.name, FLOW.name)
PARAMETERS = (
    Parameter("scheduler", ParameterKind.TEXT, FLOW.name, choices=NAMES),
    Parameter("scheduler_options", ParameterKind.OPTIONS, chosen_by="scheduler", alternatives=(EULER, FLOW)),
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("EulerDiscreteScheduler", EULER.name),
        ("euler_discrete", EULER.name),
        ("FLOW-match-euler-discrete", FLOW.name),
        ("euler", EULER.name),
        ("ddim", None),
        ("", None),
    ],
)
def test_a_class_has_short_names(text: str, found: str | None) -> None:
    assert find_class(text, NAMES) == found


def test_a_short_name_is_of_the_first_class_that_a_model_can_use() -> None:
    assert find_class("Euler", (FLOW.name,)) == FLOW.name


def test_full_names_and_the_options_of_the_class_that_is_meant() -> None:
    options = {"shift": 3, "indices": (0, 1)}
    assert resolve_classes({"scheduler_options": options}, PARAMETERS) == {"scheduler_options": options}
    given = {"scheduler": "euler", "scheduler_options": {"spacing": "leading"}, "prompt": "x"}
    assert resolve_classes(given, PARAMETERS) == {**given, "scheduler": EULER.name}


@pytest.mark.parametrize(
    ("inputs", "param", "words"),
    [
        ({"scheduler": "ddim"}, "scheduler", "must be one of EulerDiscreteScheduler, Flow"),
        (
            {"scheduler_options": {"shfit": 1.0}},
            "scheduler_options",
            "has shfit, which is not an option .* did you mean shift",
        ),
        ({"scheduler_options": {"spacing": "leading"}}, "scheduler_options", "not an option of FlowMatch"),
        (
            {"scheduler": "euler", "scheduler_options": {"spacing": "x"}},
            "scheduler_options",
            "one of leading, trailing",
        ),
        ({"scheduler_options": {"shift": None}}, "scheduler_options", "must not be null"),
        ({"scheduler_options": {"shift": True}}, "scheduler_options", "must be a number"),
        ({"scheduler_options": {"shift": float("inf")}}, "scheduler_options", "must be a number"),
        ({"scheduler_options": {"indices": "all"}}, "scheduler_options", "a whole number or a list of numbers"),
        ({"scheduler_options": {"shift": 1e12}}, "scheduler_options", "shift, which must be -1e"),
    ],
)
def test_what_is_wrong_is_said_of_the_parameter(inputs: dict[str, object], param: str, words: str) -> None:
    with pytest.raises(ParameterError, match=words) as refusal:
        resolve_classes(inputs, PARAMETERS)
    assert refusal.value.param == param
