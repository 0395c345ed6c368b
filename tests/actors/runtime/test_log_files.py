"""The files that keep what processes have logged."""

from __future__ import annotations

import logging
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from triptych.actors.runtime import log_files
from triptych.actors.runtime.log_files import LogHandler, earlier, log_path, logged_names, read_part


@pytest.fixture
def handler(tmp_path: Path) -> Iterator[LogHandler]:
    made = LogHandler(tmp_path / "logs", "head", 200)
    yield made
    made.close()


def write(handler: LogHandler, *texts: str) -> None:
    for text in texts:
        handler.emit(logging.makeLogRecord({"msg": text}))


def read_all(file: Path, position: str = "") -> tuple[list[str], str]:
    part = read_part(file, position)
    return part.lines.splitlines(), part.position


def test_a_log_is_read_on_from_where_it_was_read_to(handler: LogHandler, tmp_path: Path) -> None:
    file = log_path(tmp_path / "logs", "head")
    write(handler, "one", "two")
    lines, position = read_all(file)
    assert lines == ["one", "two"]
    assert read_all(file, position) == ([], position)
    write(handler, "three")
    with file.open("a") as opened:
        opened.write("not yet who")
    lines, position = read_all(file, position)
    assert lines == ["three"], "a line is read when it is whole"
    with file.open("a") as opened:
        opened.write("le\n")
    assert read_all(file, position)[0] == ["not yet whole"]


def test_a_large_log_begins_anew_and_no_line_is_lost_to_who_reads_on(handler: LogHandler, tmp_path: Path) -> None:
    file = log_path(tmp_path / "logs", "head")
    seen: list[str] = []
    position = ""
    texts = [f"line {number:03d}" for number in range(60)]
    for start in range(0, 60, 7):
        write(handler, *texts[start : start + 7])
        lines, position = read_all(file, position)
        seen += lines
    assert seen == texts
    kept = read_all(file)[0]
    assert kept == texts[-len(kept) :]
    assert len(kept) > 10
    assert file.stat().st_size + earlier(file).stat().st_size <= 200
    assert logged_names(tmp_path / "logs") == ["head"]


def test_who_comes_back_after_long_gets_what_is_kept(handler: LogHandler, tmp_path: Path) -> None:
    file = log_path(tmp_path / "logs", "head")
    write(handler, "first")
    _, position = read_all(file)
    write(handler, *(f"line {number:03d}" for number in range(60)))
    assert read_all(file, position)[0] == read_all(file)[0]


def test_a_part_is_bounded_and_the_next_one_goes_on(
    handler: LogHandler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "MOST_BYTES", 20)
    file = log_path(tmp_path / "logs", "head")
    write(handler, "0")
    _, position = read_all(file)
    texts = [f"{number:09d}" for number in range(16)]  # more than one file
    write(handler, *texts)
    assert read_all(file)[0] == texts[-2:], "the last ones, to begin with"
    seen: list[str] = []
    while True:
        lines, position = read_all(file, position)
        if not lines:
            break
        assert len(lines) <= 3
        seen += lines
    assert seen == texts


@pytest.mark.parametrize("position", ["x", "1:", "-1:3", "1:" + "9" * 30, "../x"])
def test_a_position_that_none_is_counts_as_none(handler: LogHandler, tmp_path: Path, position: str) -> None:
    write(handler, "one")
    assert read_all(log_path(tmp_path / "logs", "head"), position)[0] == ["one"]


def test_a_log_is_private_and_a_missing_one_is_empty(handler: LogHandler, tmp_path: Path) -> None:
    file = log_path(tmp_path / "logs", "head")
    write(handler, "one")
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert read_all(log_path(tmp_path / "logs", "api")) == ([], "")


def test_a_full_disk_ends_nothing(handler: LogHandler, tmp_path: Path) -> None:
    write(handler, "first")
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, handler._descriptor)
    os.close(full)
    write(handler, "lost")
    log_path(tmp_path / "logs", "head").unlink()
    write(handler, "x" * 300)
    assert read_all(log_path(tmp_path / "logs", "head"))[0] == ["x" * 300], "a new file, when there is room again"


def test_lines_go_on_in_the_old_file_until_there_can_be_a_new_one(handler: LogHandler, tmp_path: Path) -> None:
    file = log_path(tmp_path / "logs", "head")
    texts = [f"line {number:03d}" for number in range(20)]
    write(handler, *texts[:5])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))  # what is open stays so
    try:
        write(handler, *texts[5:15])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert read_all(file)[0] == texts[:15]
    write(handler, *texts[15:])
    assert read_all(file)[0] == texts
    assert file.read_text().splitlines() == texts[15:]
