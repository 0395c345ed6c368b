"""`python -m triptych.tools.trace STATE_DIR`: write the recorded timeline of a system as a trace for Perfetto.

A system records it while its topology says `[state] timeline = true` (`roles/timeline.py`). The trace is in Chrome's
Trace Event Format: one process for each run of a component, threads for its stages, steps and transfers, arrows from
each stage and transfer of a job to the next. `--svg` draws the same as an SVG.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final, NamedTuple
from xml.sax.saxutils import escape, quoteattr

import msgspec
from msgspec import UNSET, UnsetType

from triptych.roles.timeline import TIMELINE, JobHistory, Line, Lost, Span, TimelineProcess, timeline_file
from triptych.tools.command import make_parser
from triptych.tools.command import seconds as seconds_type

EXAMPLES = """examples:
  python -m triptych.tools.trace ~/.local/state/triptych/demo -o out/trace.json
  python -m triptych.tools.trace STATE_DIR --from 10 --seconds 2    two seconds of it, from the tenth on
  python -m triptych.tools.trace STATE_DIR --request req-7          one request
  python -m triptych.tools.trace STATE_DIR --svg out/trace.svg      as an SVG as well
  python -m triptych.tools.trace A_STATE_DIR B_STATE_DIR            copies of two hosts' folders, in one trace

Open the trace in https://ui.perfetto.dev, which reads it in the browser, or in chrome://tracing. The timeline of a
running system can be read, too; its last half second is not on the disk yet.
"""
MAX_LINE_BYTES: Final = 1 << 20
_KINDS: Final = ("head", "encoder", "denoiser", "decoder", "monolithic")
"""In the order of their rows; others follow."""
_TRACKS: Final = {"stage": "stages", "compute": "steps", "transfer": "transfers", "job": "jobs"}
"""Titles of the threads, in their order."""


class TraceError(Exception):
    """A timeline cannot be read; `str()` is a sentence that names the file."""


@dataclass(slots=True)
class ProcessTimeline:
    """What one run of a component recorded."""

    process: TimelineProcess
    spans: list[Span] = field(default_factory=list)
    jobs: list[JobHistory] = field(default_factory=list)
    lost: int = 0


class Slice(NamedTuple):
    """One bar of the trace."""

    track: str
    """A key of `_TRACKS`."""
    name: str
    began: float
    """Seconds since 1970."""
    ended: float
    jobs: tuple[str, ...]
    """Ids of the jobs that it was for."""
    args: dict[str, object]
    """What else is known of it."""


class TraceEvent(msgspec.Struct, omit_defaults=True):
    """One event of Chrome's Trace Event Format."""

    name: str
    ph: str
    """Phase: X is a complete event, s, t and f are the begin, middle and end of a flow, M is metadata."""
    pid: int
    tid: int
    ts: float
    """Microseconds."""
    dur: float | UnsetType = UNSET
    cat: str | UnsetType = UNSET
    id: int | UnsetType = UNSET
    bp: str | UnsetType = UNSET
    args: dict[str, object] | UnsetType = UNSET


# -- reading


def read_timelines(*state_dirs: Path) -> list[ProcessTimeline]:
    """Read the timelines of state folders, one of each host, in the order of their rows.

    Raises:
        TraceError: There is none, or a file is not one.
    """
    runs: dict[tuple[str, int], ProcessTimeline] = {}
    for state_dir in state_dirs:
        folder = state_dir / TIMELINE
        try:
            found = sorted((key, path) for path in folder.iterdir() if (key := timeline_file(path.name)))
        except OSError as error:
            raise TraceError(
                f"{state_dir} has no timeline ({error.strerror}): write timeline = true below [state] in the topology, "
                "restart the system and send requests"
            ) from error
        before = len(runs)
        for _, path in found:
            _read_file(path, runs)
        if len(runs) == before:
            raise TraceError(f"{folder} has no timeline")
    kinds = {kind: row for row, kind in enumerate(_KINDS)}
    return sorted(
        runs.values(),
        key=lambda run: (kinds.get(run.process.kind, len(kinds)), run.process.name, run.process.generation),
    )


def _read_file(path: Path, runs: dict[tuple[str, int], ProcessTimeline]) -> None:
    """Add the lines of a file to the run that they are of, which they may begin."""
    decoder = msgspec.json.Decoder(Line)
    run: ProcessTimeline | None = None
    try:
        with path.open("rb") as file:
            for number, text in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
                if not text.endswith(b"\n") and len(text) < MAX_LINE_BYTES:
                    break  # the end of a file whose process writes it just now, or was killed
                run = _add(path, number, _decode(path, number, text, decoder), run, runs)
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}") from error


def _decode(path: Path, number: int, text: bytes, decoder: msgspec.json.Decoder[Line]) -> Line:
    try:
        return decoder.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}, line {number}, is no event of a timeline: {error}") from error


def _add(
    path: Path, number: int, line: Line, run: ProcessTimeline | None, runs: dict[tuple[str, int], ProcessTimeline]
) -> ProcessTimeline:
    if isinstance(line, TimelineProcess):
        return runs.setdefault((line.name, line.generation), ProcessTimeline(line))
    if run is None:
        raise TraceError(f"{path}, line {number}: the first line of a timeline says whose it is, and this one does not")
    if isinstance(line, Span):
        run.spans.append(line)
    elif isinstance(line, JobHistory):
        run.jobs.append(line)
    elif isinstance(line, Lost):
        run.lost += line.events
    return run


# -- merging


def slices_of(timelines: Sequence[ProcessTimeline]) -> list[list[Slice]]:
    """Return the slices of each timeline, in seconds since 1970, oldest first.

    CLOCK_MONOTONIC is one clock for all processes since the boot of their host, so all of them are moved to the
    wall-clock time by the same amount, that of the first of them: a clock that was set meanwhile changes no order.
    """
    offsets: dict[str, float] = {}
    for run in sorted(timelines, key=lambda run: run.process.monotonic_s):
        offsets.setdefault(run.process.boot, run.process.unix_s - run.process.monotonic_s)
    return [
        sorted(
            [*(_of_span(span, offsets[run.process.boot]) for span in run.spans), *_of_jobs(run.jobs)],
            key=lambda slice_: (slice_.began, slice_.ended),
        )
        for run in timelines
    ]


def _of_span(span: Span, offset: float) -> Slice:
    args: dict[str, object] = {"attempts": list(span.attempts)} if span.attempts else {}
    if span.step:
        args["step"] = f"{span.step} of {span.total_steps}" if span.total_steps else span.step
    if span.nbytes:
        args["bytes"] = span.nbytes
    if span.error:
        args["error"] = span.error
    jobs = tuple(attempt.rpartition("#")[0] or attempt for attempt in span.attempts)
    name = f"{span.name}, batch of {len(jobs)}" if len(jobs) > 1 else span.name
    return Slice(span.track, name, span.began + offset, max(span.began, span.ended) + offset, jobs, args)


def _of_jobs(jobs: Iterable[JobHistory]) -> Iterable[Slice]:
    """Yield the states of jobs, without those that lasted no time: the head went through them at once."""
    for job in jobs:
        moves = sorted(job.states, key=lambda move: move[1])
        for (state, began), (_, ended) in pairwise(moves):
            if ended > began:
                yield Slice("job", state, began, ended, (job.job,), {"job": job.job})


def select(
    slices: Sequence[Sequence[Slice]], *, request: str = "", begin_s: float = 0.0, seconds: float = math.inf
) -> list[list[Slice]]:
    """Return the slices of a request, or all of them, that overlap `seconds` from `begin_s` after the first one.

    Raises:
        TraceError: There is none.
    """
    chosen = [[each for each in row if not request or any(_is_of(job, request) for job in each.jobs)] for row in slices]
    first = min((each.began for row in chosen for each in row), default=0.0) + begin_s
    chosen = [[each for each in row if each.ended >= first and each.began <= first + seconds] for row in chosen]
    if not any(chosen):
        raise TraceError("the timeline has no event" + (f" of request {request}" if request else " in that time"))
    return chosen


def _is_of(job: str, request: str) -> bool:
    return request in (job, job.rpartition("/")[0])


def lanes(slices: Iterable[Slice]) -> list[list[Slice]]:
    """Distribute slices that may overlap over as few lanes as possible, in each of which none do."""
    rows: list[list[Slice]] = []
    for each in sorted(slices, key=lambda slice_: slice_.began):
        free = next((row for row in rows if row[-1].ended <= each.began), None)
        if free is None:
            rows.append([each])
        else:
            free.append(each)
    return rows


def _lanes_of_jobs(slices: Iterable[Slice]) -> list[list[Slice]]:
    """As `lanes`, but all slices of a job are in one."""
    by_job: dict[tuple[str, ...], list[Slice]] = {}
    for each in slices:
        by_job.setdefault(each.jobs, []).append(each)
    whole = [row[0]._replace(ended=max(each.ended for each in row)) for row in by_job.values()]
    return [[each for bar in lane for each in by_job[bar.jobs]] for lane in lanes(whole)]


def _threads(slices: Sequence[Slice]) -> list[tuple[str, list[Slice]]]:
    """Return the threads of a process: their titles and slices."""
    rows = []
    for track, title in _TRACKS.items():
        mine = [each for each in slices if each.track == track]
        spread = _lanes_of_jobs(mine) if track == "job" else lanes(mine)
        rows += [(f"{title} {number}" if number > 1 else title, row) for number, row in enumerate(spread, start=1)]
    return rows


# -- the trace


def chrome_trace(timelines: Sequence[ProcessTimeline], slices: Sequence[Sequence[Slice]]) -> list[TraceEvent]:
    """Return the events of a trace whose time begins with the first slice.

    Args:
        timelines: One for each row.
        slices: Those of each timeline, as `slices_of` and `select` return them.
    """
    origin = min((each.began for row in slices for each in row), default=0.0)
    events: list[TraceEvent] = []
    path: dict[str, list[tuple[float, int, int]]] = {}
    for pid, (run, row) in enumerate(zip(timelines, slices, strict=True), start=1):
        if not row:
            continue
        events += _metadata(run, timelines, pid)
        for tid, (title, lane) in enumerate(_threads(row), start=1):
            events.append(TraceEvent("thread_name", "M", pid, tid, 0.0, args={"name": title}))
            events.append(TraceEvent("thread_sort_index", "M", pid, tid, 0.0, args={"sort_index": tid}))
            for each in lane:
                ts = _us(each.began - origin)
                dur = round(_us(each.ended - origin) - ts, 1)  # so that rounding makes no overlap
                events.append(TraceEvent(each.name, "X", pid, tid, ts, dur, cat=each.track, args=each.args))
                for job in each.jobs if each.track in ("stage", "transfer") else ():
                    path.setdefault(job, []).append((ts, pid, tid))
    return [*events, *_flows(path)]


def _metadata(run: ProcessTimeline, timelines: Sequence[ProcessTimeline], pid: int) -> Iterable[TraceEvent]:
    process = run.process
    restarted = sum(other.process.name == process.name for other in timelines) > 1
    name = f"{process.name} (generation {process.generation})" if restarted else process.name
    yield TraceEvent("process_name", "M", pid, 0, 0.0, args={"name": name})
    labels = f"pid {process.pid}" + (f", {run.lost} events lost" if run.lost else "")
    yield TraceEvent("process_labels", "M", pid, 0, 0.0, args={"labels": labels})
    yield TraceEvent("process_sort_index", "M", pid, 0, 0.0, args={"sort_index": pid})


def _flows(path: dict[str, list[tuple[float, int, int]]]) -> Iterable[TraceEvent]:
    """Yield arrows through the stages and transfers of each job."""
    for number, (job, points) in enumerate(sorted(path.items()), start=1):
        points.sort()
        last = len(points) - 1
        for index, (ts, pid, tid) in enumerate(points if last else ()):
            phase = "s" if index == 0 else "f" if index == last else "t"
            yield TraceEvent(job, phase, pid, tid, ts, cat="job", id=number, bp="e" if phase == "f" else UNSET)


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 1)


def write_trace(path: Path, events: Iterable[TraceEvent]) -> None:
    """Write a trace file. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": list(events)}))


# -- the SVG

_COLOURS: Final = ("#4269d0", "#e8893a", "#3ca951", "#ff725c", "#9c6ade", "#2aa6a6", "#c9a227", "#97564d")
_WIDTH, _LABELS, _LANE, _GAP, _TOP = 1060, 172, 20, 12, 30
_PICTURED: Final = ("stage", "compute", "transfer")


def draw_svg(timelines: Sequence[ProcessTimeline], slices: Sequence[Sequence[Slice]]) -> str:
    """Draw the roles' slices as an SVG: a lane for stages, one for steps, one for transfers; a colour for each job."""
    rows = []
    for run, row in zip(timelines, slices, strict=True):
        drawn = [each for each in row if each.track in _PICTURED]
        rows += [(run.process.name, title, lane) for title, lane in _threads(drawn)]
    bars = [each for _, _, lane in rows for each in lane]
    origin, end = min((bar.began for bar in bars), default=0.0), max((bar.ended for bar in bars), default=1.0)
    scale = (_WIDTH - _LABELS - 12) / max(end - origin, 1e-6)
    order = dict.fromkeys(job for bar in sorted(bars, key=lambda bar: bar.began) for job in bar.jobs)
    numbers = {job: number for number, job in enumerate(order, start=1)}
    bands: list[str] = []
    parts: list[str] = []
    y, before = _TOP, ""
    for name, title, lane in rows:
        if name != before:
            y += _GAP if before else 0
            parts.append(_text(12, y + 14, name, weight="600"))
        before = name
        parts.append(_text(_LABELS - 8, y + 14, title, anchor="end", fill="#666"))
        bands.append(
            f'<rect x="{_LABELS}" y="{y}" width="{_WIDTH - _LABELS - 12}" height="{_LANE - 3}" fill="#f3f3f3"/>'
        )
        for bar in lane:
            parts += _bar(bar, _LABELS + (bar.began - origin) * scale, y, (bar.ended - bar.began) * scale, numbers)
        y += _LANE
    axis = _axis(end - origin, scale, y)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {y + 24}" width="{_WIDTH}" '
            f'height="{y + 24}" font-family="system-ui, sans-serif" font-size="11">',
            f'<rect width="{_WIDTH}" height="{y + 24}" fill="white"/>',
            _text(_LABELS, 16, "each request has a colour and a number"),
            *bands,
            *axis,
            *parts,
            "</svg>",
            "",
        ]
    )


def _bar(bar: Slice, x: float, y: float, width: float, numbers: dict[str, int]) -> Iterable[str]:
    """Yield a bar, in a stripe for each of its jobs, with a name if there is room."""
    width = max(width, 1.5)
    height = (_LANE - 3) / max(len(bar.jobs), 1)
    jobs = bar.jobs or ("",)
    gap = 0.6 if width > 4 else 0.0
    title = ", ".join((bar.name, *(f"{key} {value}" for key, value in bar.args.items())))
    yield f"<g><title>{_printable(title)}</title>"
    for index, job in enumerate(jobs):
        colour = _COLOURS[(numbers.get(job, 1) - 1) % len(_COLOURS)]
        yield (
            f'<rect x="{x:.2f}" y="{y + index * height:.2f}" width="{width - gap:.2f}" height="{height:.2f}" '
            f'fill="{colour}"/>'
        )
    yield "</g>"
    label = f"{numbers[jobs[0]]} {bar.name}" if bar.track == "stage" else bar.name
    if len(jobs) == 1 and jobs[0] and width > 6.2 * len(label) + 6:
        yield _text(x + 4, y + 12.5, label, fill="white")


def _axis(seconds: float, scale: float, y: float) -> Iterable[str]:
    """Yield a line and a number for each round number of milliseconds."""
    least = seconds * 1000 / 12
    magnitude = 10 ** math.floor(math.log10(max(least, 1e-3)))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= least)
    for index in range(int(seconds * 1000 / step) + 1):
        x = _LABELS + index * step / 1000 * scale
        yield f'<line x1="{x:.1f}" y1="{_TOP - 6}" x2="{x:.1f}" y2="{y}" stroke="#ddd"/>'
        yield _text(x, y + 16, f"{index * step:g} ms", anchor="middle", fill="#666")


def _text(x: float, y: float, text: str, *, anchor: str = "start", fill: str = "#222", weight: str = "400") -> str:
    style = f"text-anchor={quoteattr(anchor)} fill={quoteattr(fill)} font-weight={quoteattr(weight)}"
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{_printable(text)}</text>'


def _printable(text: str) -> str:
    """Return text as XML takes it: what is in a timeline is not to be trusted."""
    return escape("".join(letter if letter.isprintable() else " " for letter in text))


# -- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the trace, and say what is in it; 1 with a sentence if there is nothing to write."""
    options = _parse(arguments)
    try:
        timelines = read_timelines(*options.state_dirs)
        chosen = select(slices_of(timelines), request=options.request, begin_s=options.begin_s, seconds=options.seconds)
        events = chrome_trace(timelines, chosen)
        write_trace(options.output, events)
        if options.svg:
            options.svg.parent.mkdir(parents=True, exist_ok=True)
            options.svg.write_text(draw_svg(timelines, chosen))
    except (TraceError, OSError) as error:
        print(f"trace: {error}", file=sys.stderr)
        return 1
    lost = sum(run.lost for run in timelines)
    print(
        f"{options.output}: {sum(map(len, chosen))} slices of {sum(map(bool, chosen))} processes"
        + (f"; {lost} events were lost" if lost else "")
        + ". Open it in https://ui.perfetto.dev"
    )
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("trace", "Write the recorded timeline of a system as a trace for Perfetto.", EXAMPLES)
    parser.add_argument(
        "state_dirs",
        metavar="STATE_DIR",
        type=Path,
        nargs="+",
        help="the state folder of a system with [state] timeline = true; of several hosts, a copy of each one's",
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("out/trace.json"), help="the trace (default: out/trace.json)"
    )
    parser.add_argument("--request", default="", help="only this request, or this job of one (ID/INDEX)")
    parser.add_argument(
        "--from", dest="begin_s", type=seconds_type, default=0.0, help="leave out this many seconds at the beginning"
    )
    parser.add_argument("--seconds", type=seconds_type, default=math.inf, help="only so many seconds (default: all)")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw an SVG as well")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
