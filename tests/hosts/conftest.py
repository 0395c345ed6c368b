"""Hosts that are namespaces of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from triptych.tools.hosts import Hosts


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Three hosts, a, b and c; a test that makes a fault heals it. Where they cannot be made, it says what to type."""
    with Hosts() as made:
        yield made
