from __future__ import annotations

from triptych.tools.bench.report import compare


def test_the_ratio_is_above_one_where_ours_is_better() -> None:
    more = compare("b", "c", "1/s", ours=[1, 4, 9], peer="p", peer_values=[2])
    less = compare("b", "c", "ms", ours=[2], peer="p", peer_values=[1, 4, 9], higher_is_better=False)
    assert more["ours"] == less["peer_value"] == 4
    assert more["ratio"] == less["ratio"] == 2


def test_nothing_at_all_has_no_ratio_and_ends_no_run() -> None:
    assert compare("b", "c", "steps", ours=[0], peer="p", peer_values=[40], higher_is_better=False)["ratio"] is None
