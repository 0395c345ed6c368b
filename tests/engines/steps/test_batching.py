"""Arguments of calls are taken apart, merged and split by their rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from triptych.engines.steps.batching import (
    LeafRule,
    UnbatchableError,
    arguments_of,
    arguments_of_call,
    digest,
    merge,
    split,
)
from triptych.engines.steps.denoiser_calls import DenoiserCall
from triptych.engines.steps.denoising import Denoising


def rules(values: dict[str, Any]) -> dict[str, LeafRule]:
    leaves = arguments_of(values, next(iter(values))).leaves
    return {".".join(map(str, leaf.path)): leaf.rule for leaf in leaves if leaf.rule is not LeafRule.VALUE}


def test_the_rule_of_a_leaf_follows_from_its_shape() -> None:
    found = rules(
        {
            "hidden_states": torch.zeros(2, 3, 4),
            "timestep": torch.tensor(3),
            "img_ids": torch.zeros(5, 3),
            "guidance": torch.zeros(2),
            "added": {"time_ids": torch.zeros(2, 6), "scales": [torch.zeros(2, 1), torch.zeros(7)]},
            "return_dict": False,
        }
    )
    assert found == {
        "hidden_states": LeafRule.ROWS,
        "timestep": LeafRule.SCALAR,
        "img_ids": LeafRule.SHARED,
        "guidance": LeafRule.ROWS,
        "added.time_ids": LeafRule.ROWS,
        "added.scales.0": LeafRule.ROWS,
        "added.scales.1": LeafRule.SHARED,
    }


def test_lists_of_one_tensor_for_each_row_are_items_where_the_first_argument_is_one() -> None:
    items = [torch.zeros(4, 1, 2, 2)]
    assert rules({"x": items, "t": torch.zeros(1), "texts": [torch.zeros(9, 8)], "more": {"a": [torch.zeros(1)]}}) == {
        "x": LeafRule.ITEMS,
        "t": LeafRule.ROWS,
        "texts": LeafRule.ITEMS,
        "more.a.0": LeafRule.ROWS,
    }
    assert rules({"x": torch.zeros(1, 4), "samples": [torch.zeros(1, 8)]})["samples.0"] is LeafRule.ROWS


@pytest.mark.parametrize(
    "values",
    [
        {"x": torch.zeros(5, 3)},  # more rows than a request has: a packed sequence
        {"x": torch.zeros(1)},
        {"x": [torch.zeros(1)] * 5},
        {"x": "text"},
        {"x": torch.zeros(1, 3), "cache": object()},
    ],
)
def test_what_has_no_rows_or_a_state_cannot_be_merged(values: dict[str, Any]) -> None:
    with pytest.raises(UnbatchableError):
        arguments_of(values, "x")


@pytest.mark.parametrize(
    ("values", "others"),
    [
        ({"a": torch.zeros(1, 3)}, {"a": torch.zeros(1, 4)}),
        ({"a": torch.zeros(1, 3)}, {"a": torch.zeros(1, 3, dtype=torch.float64)}),
        ({"a": torch.zeros(1, 3)}, {"a": torch.zeros(2, 3)}),
        ({"a": torch.zeros(1, 3)}, {"a": None}),
        ({"a": torch.zeros(1, 3)}, {}),
        ({"a": True}, {"a": 1}),
        ({"a": {"scale": 1.0}}, {"a": {"scale": 0.5}}),
        ({"a": [(1, 2, 3)]}, {"a": [(1, 3, 2)]}),
        (
            {"a": torch.zeros(1, 2, 4, 4)},
            {"a": torch.zeros(1, 2, 4, 4).contiguous(memory_format=torch.channels_last)},
        ),
    ],
)
def test_calls_whose_shapes_or_plain_values_differ_have_other_outlines(values: Any, others: Any) -> None:
    rows = {"x": torch.zeros(1, 3)}
    one, other = arguments_of({**rows, **values}, "x"), arguments_of({**rows, **others}, "x")
    assert one.outline != other.outline
    assert one.outline == arguments_of({**rows, **values}, "x").outline
    assert hash(one.outline) == hash(arguments_of({**rows, **values}, "x").outline)


def test_calls_are_merged_and_their_output_is_split_in_the_same_order() -> None:
    ids = torch.arange(3)
    calls = [
        arguments_of(
            {
                "x": torch.full((2, 3), float(number)),
                "t": torch.tensor(number),
                "ids": ids,
                "more": {"y": (torch.full((2, 1), number), None), "scale": 0.5},
            },
            "x",
        )
        for number in range(3)
    ]
    merged = merge(calls)
    assert merged["x"][:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert merged["t"].tolist() == [0, 0, 1, 1, 2, 2]
    assert merged["ids"] is ids
    assert merged["more"]["y"][0].flatten().tolist() == [0, 0, 1, 1, 2, 2]
    assert merged["more"]["y"][1] is None
    assert merged["more"]["scale"] == 0.5
    output = ({"sample": merged["x"]}, [merged["t"]], None)
    parts = split(output, 2, 3, by_item=False)
    for number, (samples, times, nothing) in enumerate(parts):
        assert samples["sample"].tolist() == [[number] * 3] * 2
        assert times[0].tolist() == [number] * 2
        assert nothing is None


def test_items_are_joined_and_outputs_are_never_split_by_a_shape_that_happens_to_fit() -> None:
    # The items of four requests have four channels.
    calls = [arguments_of({"x": [torch.full((4, 2), float(number))]}, "x") for number in range(4)]
    merged = merge(calls)
    assert [int(item[0, 0]) for item in merged["x"]] == [0, 1, 2, 3]
    parts = split((merged["x"],), 1, 4, by_item=True)
    assert [int(part[0][0][0, 0]) for part in parts] == [0, 1, 2, 3]


def test_a_leaf_that_is_passed_once_is_that_of_the_first() -> None:
    calls = [arguments_of({"x": torch.zeros(1, 2), "ids": torch.ones(1, 4)}, "x")] * 2
    assert merge(calls, frozenset({("ids",)}))["ids"].shape == (1, 4)
    assert merge(calls)["ids"].shape == (2, 4)


@pytest.mark.parametrize("output", [torch.zeros(3, 2), torch.tensor(1.0), object(), [torch.zeros(1), torch.zeros(1)]])
def test_an_output_without_the_rows_of_the_calls_cannot_be_split(output: object) -> None:
    with pytest.raises(UnbatchableError):
        split(output, 1, 2, by_item=False)


def test_a_leaf_is_replaced_wherever_it_is() -> None:
    values = {"x": torch.zeros(1, 2), "more": {"a": [torch.zeros(1), torch.zeros(1)], "b": 1}}
    replaced = arguments_of(values, "x").replace(("more", "a", 1), torch.ones(1))
    assert [int(item) for item in replaced.values["more"]["a"]] == [0, 1]
    assert replaced.values["more"]["b"] == 1
    assert replaced.outline == arguments_of(values, "x").outline


class Module(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: object = None, **more: object) -> torch.Tensor:
        return x


class Unnamed(torch.nn.Module):
    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return args[0]


def test_arguments_of_a_call_have_the_names_of_forward() -> None:
    run = Denoising(dict)
    x, t = torch.zeros(1, 2), torch.zeros(1)
    by_name = DenoiserCall(Module(), (), {"more": 1, "t": t, "x": x}, None, run, 0)
    by_position = DenoiserCall(Module(), (x, t), {"more": 1}, None, run, 0)
    assert set(arguments_of_call(by_name).values) == {"x", "t", "more"}
    assert arguments_of_call(by_name).rows == 1
    assert [leaf.value is t for leaf in arguments_of_call(by_position).leaves] == [False, True, False]
    with pytest.raises(UnbatchableError):
        arguments_of_call(DenoiserCall(Unnamed(), (x,), {}, None, run, 0))


def test_digests_are_those_of_the_values_and_follow_a_change() -> None:
    ids = torch.arange(6.0).reshape(2, 3)
    before = digest(ids)
    assert digest(ids.clone()) == before
    assert digest([ids, ids]) == (before, before)
    assert digest(torch.tensor(1.0).expand(4)) == digest(torch.ones(4))
    ids += 1
    assert digest(ids) != before
    assert digest(torch.zeros(3, dtype=torch.bfloat16)) == digest(torch.zeros(3, dtype=torch.bfloat16))
