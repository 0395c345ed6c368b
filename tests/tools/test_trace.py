"""Timelines of several processes become one trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import msgspec
import pytest

from triptych.roles.timeline import TIMELINE, JobHistory, Line, Lost, Span, TimelineProcess
from triptych.tools import trace
from triptych.tools.trace import Slice, TraceError, chrome_trace, lanes, read_timelines, select, slices_of


def process(name: str, *, boot: str = "b", monotonic_s: float = 10.0, unix_s: float = 1000.0, **more: Any) -> Line:
    kind = name.partition("-")[0]
    about: dict[str, Any] = {"kind": kind, "generation": 1, "pid": 5, **more}
    return TimelineProcess(name=name, boot=boot, monotonic_s=monotonic_s, unix_s=unix_s, **about)


def span(name: str, began: float, ended: float, *attempts: str, track: Any = "stage", **more: Any) -> Span:
    return Span(track=track, name=name, began=began, ended=ended, attempts=attempts or ("r/0#1",), **more)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a file of the timeline; returns the state folder."""

    def write_one(*lines: Line, end: bytes = b"") -> Path:
        (tmp_path / TIMELINE).mkdir(exist_ok=True)
        first = lines[0]
        name = f"{first.name}.{first.generation}" if isinstance(first, TimelineProcess) else "encoder-0.1"
        part = len(list((tmp_path / TIMELINE).glob(f"{name}*")))
        path = tmp_path / TIMELINE / f"{name}{f'.{part + 1}' if part else ''}.jsonl"
        path.write_bytes(msgspec.json.Encoder().encode_lines(lines) + end)
        return tmp_path

    return write_one


def test_the_processes_of_a_host_share_a_clock_and_others_go_by_the_wall(write: Any, tmp_path: Path) -> None:
    # The second one began after the clock was set back by ten minutes: its monotonic time says that it was later.
    write(process("encoder-0"), span("encoder", 11.0, 12.0))
    write(process("denoiser-0", monotonic_s=12.5, unix_s=1002.5 - 600), span("denoiser", 13.0, 14.0))
    state = write(process("decoder-0", boot="other", monotonic_s=1.0, unix_s=1004.0), span("decoder", 1.5, 2.0))
    elsewhere = tmp_path / "copy of another host's" / TIMELINE
    elsewhere.mkdir(parents=True)
    (state / TIMELINE / "decoder-0.1.jsonl").rename(elsewhere / "decoder-0.1.jsonl")
    rows = slices_of(read_timelines(state, elsewhere.parent))
    assert [[(each.name, each.began, each.ended) for each in row] for row in rows] == [
        [("encoder", 1001.0, 1002.0)],
        [("denoiser", 1003.0, 1004.0)],
        [("decoder", 1004.5, 1005.0)],
    ]


def test_the_parts_of_a_run_are_one_row_and_another_run_is_another(write: Any) -> None:
    write(process("denoiser-0"), span("a", 11.0, 12.0), Lost(events=3))
    write(process("denoiser-0"), span("b", 12.0, 13.0))
    state = write(process("denoiser-0", generation=2, pid=6), span("c", 14.0, 15.0))
    runs = read_timelines(state)
    assert [([each.name for each in run.spans], run.lost) for run in runs] == [(["a", "b"], 3), (["c"], 0)]
    names = [each.args for each in chrome_trace(runs, slices_of(runs)) if each.name == "process_name"]
    assert names == [{"name": "denoiser-0 (generation 1)"}, {"name": "denoiser-0 (generation 2)"}]


def test_slices_of_a_lane_never_overlap() -> None:
    def at(began: float, ended: float) -> Slice:
        return Slice("stage", "", began, ended, (), {})

    first, second, third, fourth = at(0, 4), at(1, 2), at(2, 5), at(4, 6)
    assert lanes([fourth, third, second, first]) == [[first, fourth], [second, third]]


def test_a_trace_has_rows_threads_and_the_path_of_each_job(write: Any, tmp_path: Path) -> None:
    write(process("encoder-0"), span("encoder", 11.0, 12.0), span("store", 12.0, 12.1, track="transfer", nbytes=64))
    write(
        process("denoiser-0"),
        span("load", 12.2, 12.3, track="transfer"),
        span("denoiser", 12.3, 13.0),
        span("denoiser", 12.4, 13.5, "s/0#2"),
        span("step", 12.4, 12.8, "r/0#1", "s/0#2", track="compute", step=1, total_steps=4),
        span("load", 12.9, 13.1, "t/0#1", track="transfer", error="it is gone"),
    )
    states = (("PENDING", 1000.5), ("ENCODER_WAITING", 1000.5), ("ENCODER_RUNNING", 1001.0), ("DONE", 1002.0))
    state = write(process("head"), JobHistory(job="r/0", states=states))
    out = tmp_path / "out" / "trace.json"
    assert trace.main([str(state), "-o", str(out)]) == 0
    document = json.loads(out.read_bytes())
    events = document["traceEvents"]
    for event in events:
        assert event["ph"] in "XMstf"
        assert isinstance(event["name"], str)
        assert event["ts"] >= 0
        assert event["pid"] > 0
        assert ("dur" in event) == (event["ph"] == "X")
        assert ("id" in event) == (event["ph"] in "stf")
    rows = {event["args"]["name"]: event["pid"] for event in events if event["name"] == "process_name"}
    assert list(rows) == ["head", "encoder-0", "denoiser-0"]
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    slices = [event for event in events if event["ph"] == "X"]
    table = [(e["pid"], threads[e["pid"], e["tid"]], e["name"], e["ts"], e["dur"]) for e in slices]
    assert (rows["head"], "jobs", "ENCODER_WAITING", 0.0, 500_000.0) in table
    assert (rows["encoder-0"], "transfers", "store", 1_500_000.0, 100_000.0) in table
    assert (rows["denoiser-0"], "stages 2", "denoiser", 1_900_000.0, 1_100_000.0) in table
    (batch,) = [event for event in slices if event["cat"] == "compute"]
    assert batch["name"] == "step, batch of 2"
    assert batch["args"] == {"attempts": ["r/0#1", "s/0#2"], "step": "1 of 4"}
    assert [e["args"]["error"] for e in slices if "error" in e["args"]] == ["it is gone"]
    # Each arrow begins and ends where a slice does; a job that did one thing has none.
    flows = [event for event in events if event["ph"] in "stf"]
    assert [(event["ph"], event["name"]) for event in flows] == [(phase, "r/0") for phase in "sttf"]
    starts = {(e["pid"], e["tid"], e["ts"]) for e in slices}
    assert all((e["pid"], e["tid"], e["ts"]) in starts for e in flows)


def test_a_request_or_a_time_can_be_chosen(write: Any) -> None:
    rows = slices_of(read_timelines(write(process("encoder-0"), span("a", 11, 12), span("b", 13, 14, "s/1#1"))))
    assert [each.name for each in select(rows, request="s")[0]] == ["b"]
    assert [each.name for each in select(rows, request="s/1")[0]] == ["b"]
    assert [each.name for each in select(rows, begin_s=1.5)[0]] == ["b"]
    assert [each.name for each in select(rows, seconds=1.5)[0]] == ["a"]
    with pytest.raises(TraceError, match="no event of request x"):
        select(rows, request="x")


def test_the_drawing_is_svg_whatever_the_names_are(write: Any, tmp_path: Path) -> None:
    evil = '</text><script>"&\x07'
    state = write(
        process("denoiser-0"),
        span(evil, 11.0, 12.0),
        span("step", 11.0, 11.5, "r/0#1", "s/0#1", track="compute"),
        span("load", 11.4, 11.4, "s/0#1", track="transfer"),
    )
    drawing = tmp_path / "trace.svg"
    assert trace.main([str(state), "-o", str(tmp_path / "t.json"), "--svg", str(drawing)]) == 0
    drawn = ET.parse(drawing).getroot()
    assert not [node for node in drawn.iter() if node.tag.endswith("script")]
    assert evil[:-1] in "".join(node.text or "" for node in drawn.iter())
    widths = [float(node.attrib["width"]) for node in drawn.iter() if node.tag.endswith("rect")]
    assert min(widths) > 0


def test_the_end_of_a_file_that_is_being_written_is_left_out(write: Any) -> None:
    state = write(process("encoder-0"), span("a", 11.0, 12.0), end=b'{"type":"span","na')
    (run,) = read_timelines(state)
    assert [each.name for each in run.spans] == ["a"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"type":"span","track":"stage","name":"a","began":1.0}\n', "line 2, is no event"),
        (b'{"type":"span","track":"x","name":"a","began":1.0,"ended":2.0}\n', "line 2, is no event"),
        (b'{"type":"span","track":"stage","name":"a","began":-1.0,"ended":2.0}\n', "line 2, is no event"),
        (b'{"type":"nothing"}\n', "line 2, is no event"),
        (b"\xff\xfe\n", "line 2, is no event"),
        (b" " * ((1 << 20) + 5) + b"\n", "line 2, is no event"),
    ],
)
def test_a_damaged_file_is_named(write: Any, capsys: pytest.CaptureFixture[str], line: bytes, problem: str) -> None:
    state = write(process("encoder-0"), end=line)
    assert trace.main([str(state)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("trace: ")
    assert f"encoder-0.1.jsonl, {problem}" in said


def test_a_file_that_does_not_say_whose_it_is_is_refused(write: Any) -> None:
    with pytest.raises(TraceError, match="first line"):
        read_timelines(write(span("a", 1.0, 2.0)))


def test_a_system_without_a_timeline_is_told_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace.main([str(tmp_path)]) == 1
    assert "timeline = true" in capsys.readouterr().err
