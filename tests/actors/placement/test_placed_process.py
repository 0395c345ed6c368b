"""A host's process, kept running: real processes, which end with their stdin."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from triptych.actors.placement.placed_process import PlacedProcess

UNTIL_EOF = "import sys; print('up', flush=True); sys.stdin.read(); print('drained', flush=True)"


def process_of(code: str, final: tuple[int, ...] = (0,)) -> PlacedProcess:
    return PlacedProcess([sys.executable, "-Sc", code], os.environ, final)


def until_over(process: PlacedProcess) -> tuple[list[str], int]:
    lines: list[str] = []
    after = 0
    while True:
        report = process.poll(after, 30)
        lines += report.lines
        after = report.next
        if report.code is not None:
            return lines, report.code


def test_it_drains_when_it_is_told_to_stop_and_every_line_is_reported_once() -> None:
    process = process_of(UNTIL_EOF)
    runner = threading.Thread(target=process.run)
    runner.start()
    assert process.poll(0, 30).lines == ["up"]
    assert process.poll(1, 0.0).lines == []
    process.stop()
    assert until_over(process) == (["up", "drained"], 0)
    runner.join()


def test_it_runs_again_when_it_fails_and_not_when_it_ends_for_good(tmp_path: Path) -> None:
    tried = tmp_path / "tried"
    code = f"import pathlib, sys; f = pathlib.Path({str(tried)!r}); n = f.exists(); f.touch(); sys.exit(2 if n else 1)"
    process = process_of(code, final=(0, 2))
    process.run()
    lines, ended = until_over(process)
    assert ended == 2
    assert [line.partition(",")[0] for line in lines] == ["ended with exit code 1"]


def test_a_stop_between_two_tries_is_heeded() -> None:
    process = process_of("raise SystemExit(1)")
    runner = threading.Thread(target=process.run)
    runner.start()
    assert process.poll(0, 30).lines
    process.stop()
    assert until_over(process)[1] == 1
    runner.join()


@pytest.mark.parametrize("written", [3, 1500])
def test_what_nobody_fetches_is_kept_up_to_a_bound(written: int) -> None:
    process = process_of(f"for n in range({written}): print(n)")
    process.run()
    report = process.poll(0, 0.0)
    assert report.lines == [str(n) for n in range(written)][-1000:]
    assert report.next == written
    assert process.poll(written - 1, 0.0).lines == [str(written - 1)]
