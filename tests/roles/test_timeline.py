"""What a process records of itself, and how it gets to the disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from triptych.actors.runtime.metrics import REGISTRY
from triptych.roles.messages.common import Attempt
from triptych.roles.timeline import (
    MAX_FILES,
    TIMELINE,
    JobHistory,
    Line,
    Lost,
    Span,
    Timeline,
    TimelineFiles,
    TimelineProcess,
    TimelineWriter,
    timeline_file,
    timeline_of,
)

PROCESS = TimelineProcess(
    name="denoiser-0", kind="denoiser", generation=7, pid=1, boot="b", monotonic_s=1.0, unix_s=100.0
)


def lines(path: Path) -> list[Line]:
    return msgspec.json.Decoder(Line).decode_lines(path.read_bytes())


def test_nothing_is_kept_unless_it_is_asked_for() -> None:
    timeline = Timeline()
    timeline.span("stage", "denoiser", 1.0, Attempt("r/0", 1))
    with timeline.measure("transfer", "load", Attempt("r/0", 1)):
        pass
    assert (timeline.take(), timeline.recorded) == ([], 0)


def test_a_span_has_its_attempts_and_what_was_found_out_about_it() -> None:
    timeline = Timeline(on=True)
    batch = Attempt("r/0", 1), Attempt("s/1", 2)
    timeline.span("compute", "step", 1.0, *batch, ended=2.0, step=3, total_steps=4)
    with timeline.measure("transfer", "store", Attempt("r/0", 1)) as measured:
        measured.nbytes = 5
    with pytest.raises(ValueError, match="broken"), timeline.measure("transfer", "load", nbytes=6):
        raise ValueError("broken")
    step, store, load = timeline.take()
    assert step == Span(
        track="compute", name="step", began=1.0, ended=2.0, attempts=("r/0#1", "s/1#2"), step=3, total_steps=4
    )
    assert isinstance(store, Span)
    assert (store.nbytes, store.error) == (5, "")
    assert isinstance(load, Span)
    assert (load.nbytes, load.error) == (6, "ValueError: broken")
    assert store.began <= store.ended <= load.began <= load.ended
    assert timeline.take() == []


def test_events_that_find_no_room_are_counted() -> None:
    timeline = Timeline(on=True, capacity=2)
    for number in range(5):
        timeline.span("stage", str(number), 0.0)
    first, second, lost = timeline.take()
    assert [getattr(event, "name", "") for event in (first, second)] == ["0", "1"]
    assert lost == Lost(events=3)
    timeline.span("stage", "5", 0.0)
    assert len(timeline.take()) == 1, "what was lost is said once"
    assert (timeline.recorded, timeline.lost) == (6, 3)


def test_a_long_timeline_has_parts_and_the_oldest_go(tmp_path: Path) -> None:
    (tmp_path / "denoiser-0.3.jsonl").write_text("of an earlier run\n")
    (tmp_path / "denoiser-01.3.jsonl").write_text("of another component\n")
    files = TimelineFiles(tmp_path, PROCESS, part_bytes=400)
    files.open()
    events = [Span(track="stage", name=f"stage {number}", began=0.0, ended=1.0) for number in range(30)]
    for event in events:
        files.write([event])
    found = sorted((key, path) for path in tmp_path.iterdir() if (key := timeline_file(path.name)))
    mine = [path for (name, _, _), path in found if name == "denoiser-0"]
    assert len(mine) == MAX_FILES
    assert (tmp_path / "denoiser-01.3.jsonl").exists()
    kept: list[Line] = []
    for path in mine:
        first, *rest = lines(path)
        assert first == PROCESS
        assert path.stat().st_mode & 0o777 == 0o600
        kept += rest
    assert kept == events[-len(kept) :]


@pytest.mark.parametrize("name", ["denoiser-0.jsonl", "../denoiser-0.1.jsonl", "denoiser-0.1.jsonl.tmp", "d.1.x.jsonl"])
def test_other_files_are_no_timelines(name: str) -> None:
    assert timeline_file(name) is None


def test_an_actor_writes_what_the_others_recorded_also_what_came_last(
    run: Any, make_topology: Any, local_cluster: Any, tiny_model: Path
) -> None:
    async def body() -> None:
        async with local_cluster(make_topology(tiny_model)) as h:
            component = h.topology.component("denoiser-0")
            assert timeline_of(component, h.topology)[1] == [], "only if the topology says so"
            timeline = Timeline(on=True)
            writer = TimelineWriter(component, h.topology, timeline)
            await h.start(writer, generation=9)
            timeline.span("stage", "denoiser", 1.0, Attempt("r/0", 1))
            await writer.flush()
            history = JobHistory(job="r/0", states=(("DONE", 1.0),))
            timeline.add(history)
            await h.stop(writer.name)
            path = h.topology.state_dir / TIMELINE / "denoiser-0.9.jsonl"
            process, span, last = lines(path)
            assert isinstance(process, TimelineProcess)
            assert (process.name, process.kind, process.generation) == ("denoiser-0", "denoiser", 9)
            assert isinstance(span, Span)
            assert last == history
            assert writer.stats() == {"recorded": 2, "lost": 0, "recording": True}

    run(body())


def test_a_disk_that_cannot_be_written_ends_the_timeline_and_nothing_else(
    run: Any, make_topology: Any, local_cluster: Any, tiny_model: Path
) -> None:
    async def body() -> None:
        async with local_cluster(make_topology(tiny_model)) as h:
            timeline = Timeline(on=True)
            writer = TimelineWriter(h.topology.component("denoiser-0"), h.topology, timeline)
            h.topology.state_dir.mkdir(parents=True, exist_ok=True)
            (h.topology.state_dir / TIMELINE).write_text("a file is where the folder would be")
            await h.start(writer)
            timeline.span("stage", "denoiser", 1.0)
            assert writer.stats() == {"recorded": 0, "lost": 0, "recording": False}
            await h.stop(writer.name)

    run(body())


def test_what_takes_time_is_counted_also_where_nothing_is_kept() -> None:
    def counted(name: str, **labels: str) -> float:
        return REGISTRY.get_sample_value(name, labels) or 0.0

    timeline, attempt = Timeline(), Attempt("r/0", 1)
    names = ("seconds_count", "bytes_total", "failures_total")
    before = [counted(f"triptych_transfer_{name}", transfer="load") for name in names]
    steps, batched = counted("triptych_step_seconds_count"), counted("triptych_batch_size_sum")
    with timeline.measure("transfer", "load", attempt, nbytes=6):
        pass
    with pytest.raises(ValueError, match="broken"), timeline.measure("transfer", "load", attempt, nbytes=7):
        raise ValueError("broken")
    timeline.span("compute", "step", 1.0, attempt, attempt)
    after = [counted(f"triptych_transfer_{name}", transfer="load") for name in names]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 6, 1]
    assert counted("triptych_step_seconds_count") == steps + 1
    assert counted("triptych_batch_size_sum") == batched + 2
