from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from triptych.backoff import backoff_s


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_a_pause_is_bounded_and_jitter_takes_up_to_half_off(pauses: int, jitter: float) -> None:
    longest = backoff_s(pauses, first_s=0.25, longest_s=10, jitter=0)
    assert longest == (10 if pauses > 5 else 0.25 * 2**pauses)
    assert longest / 2 <= backoff_s(pauses, first_s=0.25, longest_s=10, jitter=jitter) <= longest
    assert longest / 2 <= backoff_s(pauses, first_s=0.25, longest_s=10) <= longest  # with one that it draws
