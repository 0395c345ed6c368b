"""The benchmark of the bus, as short as it can be: that it runs and how it reports."""

from __future__ import annotations

import subprocess
import sys

import pytest

from triptych.tools.bench import bus, report


def test_the_ratio_is_above_one_where_ours_is_better() -> None:
    rates = report.compare("bus", "c", "asks/s", ours=[3, 1, 2], peer="raw", peer_values=[4, 4, 9])
    times = report.compare("bus", "c", "s", ours=[1], peer="raw", peer_values=[4], higher_is_better=False)
    assert (rates["ours"], rates["peer_value"], rates["ratio"]) == (2, 4, 0.5)
    assert times["ratio"] == 4


def test_each_pair_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "_PEERS", {"actor_tcp": "actor", "raw": "raw"})  # xoscar takes long to import
    monkeypatch.setattr(bus, "_PAIRS", (("actor_tcp", "raw"),))
    monkeypatch.setattr(bus, "_SECONDS", 0.05)
    monkeypatch.setattr(bus, "_WARM_UP_S", 0.05)
    cases = list(bus.run(1))
    assert [case["case"] for case in cases] == [
        "actor over tcp, 20 B, 1 in flight",
        "actor over tcp, 20 B, 64 in flight",
        "actor over tcp, 4 KiB, 1 in flight",
    ]
    assert all(case["ours"] > 0 and case["peer_value"] > 0 for case in cases)


def test_help_shows_examples() -> None:
    command = [sys.executable, "-m", "triptych.tools.bench", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "python -m triptych.tools.bench bus --rounds 1" in shown
