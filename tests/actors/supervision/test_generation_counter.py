"""Generation numbers: they rise, whatever the file and the clock say."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from triptych.actors.supervision._generation_counter import GenerationCounter, next_generation


@given(st.integers(0, 1 << 53), st.integers(0, 1 << 53))
def test_a_generation_is_above_the_stored_one_and_not_below_the_clock(stored: int, now: int) -> None:
    assert next_generation(stored, now) > stored
    assert next_generation(stored, now) >= now


def test_generations_never_repeat(folder: Path) -> None:
    generations = GenerationCounter(folder / "g")
    with ThreadPoolExecutor(4) as pool:
        taken = list(pool.map(lambda _: generations.next("head"), range(200)))
    assert len(set(taken)) == 200
    assert GenerationCounter(folder / "g").next("head") > max(taken)


def test_generations_survive_a_clock_that_goes_back_and_a_broken_file(folder: Path) -> None:
    generations = GenerationCounter(folder)
    future = 1 << 50
    (folder / "head").write_text(str(future))
    assert generations.next("head") == future + 1
    assert generations.next("api") < future
    (folder / "head").write_text("garbage")
    assert 0 < GenerationCounter(folder).next("head") < future


def test_a_full_disk_takes_no_generation_away(folder: Path) -> None:
    generations = GenerationCounter(folder)
    (folder / "head.new").symlink_to("/dev/full")
    first = generations.next("head")
    assert 0 < first < generations.next("head")
    assert not (folder / "head").exists()


def test_a_host_whose_clock_is_behind_counts_by_the_clock_that_it_is_told(folder: Path) -> None:
    on_time, behind = GenerationCounter(folder / "a"), GenerationCounter(folder / "b", clock_ahead_ms=3_600_000)
    assert behind.next("head") > on_time.next("head") + 3_500_000
