from __future__ import annotations

from triptych.percentile import percentile


def test_a_percentile_is_a_value_that_was_there() -> None:
    assert [percentile([3.0, 1.0, 4.0, 2.0], percent) for percent in (25, 50, 95, 100)] == [1.0, 2.0, 4.0, 4.0]
    assert [percentile([1.0, 3.0], percent) for percent in (0, 50, 51)] == [1.0, 1.0, 3.0]
    assert [percentile(range(1, 101), percent) for percent in (7, 99)] == [7, 99], "a share as a float comes to 8"
    assert percentile([], 99) == 0.0
