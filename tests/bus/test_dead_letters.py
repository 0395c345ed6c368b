from __future__ import annotations

from structlog.testing import capture_logs

from triptych.bus import DeadLetters, Envelope, EnvelopeKind


def test_all_are_counted_and_the_last_hundred_kept() -> None:
    letters = DeadLetters()
    for number in range(250):
        letters.add("unreadable", str(number))
    assert letters.count == 250
    assert [letter.detail for letter in letters.recent] == [str(number) for number in range(150, 250)]


def test_a_letter_names_both_ends() -> None:
    letters = DeadLetters()
    letters.add("mailbox_full", "why", Envelope("head", "api", EnvelopeKind.ASK, 1, 0, 2.0, 7))
    (letter,) = letters.recent
    assert (letter.to, letter.sender, letter.generation) == ("head", "api", 7)
    assert (letter.reason, letter.detail) == ("mailbox_full", "why")


def test_a_flood_is_not_a_flood_of_log_lines() -> None:
    letters = DeadLetters()
    with capture_logs() as lines:
        for _ in range(1000):
            letters.add("unreadable", "noise")
    assert 1 <= len(lines) < 1000
    assert lines[0]["log_level"] == "warning"
    assert lines[0]["reason"] == "unreadable"
