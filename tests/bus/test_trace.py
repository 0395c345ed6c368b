from __future__ import annotations

import re

import pytest

from triptych.bus import child_traceparent, new_traceparent


def test_a_new_trace_has_the_standard_form() -> None:
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", new_traceparent())


def test_a_child_keeps_trace_and_flags_but_has_its_own_span() -> None:
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"
    child = child_traceparent(parent)
    assert child[:36] == parent[:36]
    assert child[-2:] == "00"
    assert child[36:52] != parent[36:52]


@pytest.mark.parametrize(
    "unreadable",
    [
        "",
        "garbage",
        "00-" + "0" * 32 + "-00f067aa0ba902b7-01",
        "00-4bf92f3577b34da6a3ce929d0e0e4736-" + "0" * 16 + "-01",
        "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
    ],
)
def test_what_cannot_be_read_starts_a_new_trace(unreadable: str) -> None:
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", child_traceparent(unreadable))
