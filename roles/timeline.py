"""The timeline of a process: what it did when, recorded while `[state] timeline` is true.

Actors record events in a `Timeline`, which keeps them in memory. A `TimelineWriter` in the same process appends them to
`STATE_DIR/timeline/NAME.GENERATION.jsonl`, on a thread: one JSON object a line, first a `TimelineProcess`, then
events. Begin and end are seconds of CLOCK_MONOTONIC, which is the same for all processes of a host; the first line has
the wall-clock time as well. `tools/trace.py` reads the files.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

import msgspec
from msgspec import Meta

from triptych.actors import Actor, Component, Topology
from triptych.roles.messages.common import Attempt
from triptych.roles.metrics import observe_span
from triptych.roles.previews import denoise_of, is_preview
from triptych.roles.trace_exporter import TraceExporter
from triptych.roles.tracing import (
    AttributeValue,
    TraceContext,
    TraceSpan,
    attempt_name,
    context_of,
    new_span_id,
    span_id_of,
)

TIMELINE: Final = "timeline"
"""Folder of the timelines, under the state folder."""
SUFFIX: Final = ".timeline"
"""What the name of a writer adds to that of its component."""
MAX_BUFFERED: Final = 16_384
"""Most events in memory; more are counted as lost."""
WRITE_EVERY_S: Final = 0.5
RUN: Final = "run"
"""Name of the span of a whole stage in a trace, where the attempt has the name of the stage."""
PART_BYTES: Final = 16 << 20
"""Size from which the next file of a process is begun."""
MAX_FILES: Final = 4
"""Most files of a component; the oldest are removed."""

Text = Annotated[str, Meta(max_length=160)]
Instant = Annotated[float, Meta(ge=0, le=1e12)]
"""Seconds of a clock."""
Natural = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Track: TypeAlias = Literal["stage", "compute", "transfer"]
"""What a span is a part of: a whole stage, one call to the device, or a transfer of tensors."""

_FILE = re.compile(r"(?P<name>[a-z][a-z0-9_-]*)\.(?P<generation>[0-9]{1,16})(\.(?P<part>[0-9]{1,9}))?\.jsonl")


class _Line(msgspec.Struct, frozen=True, tag_field="type", omit_defaults=True, kw_only=True):
    """One line of a file."""


class TimelineProcess(_Line, frozen=True, tag="process"):
    """The first line: whose events follow, and one moment by both clocks."""

    name: Text
    kind: Text
    generation: Natural
    pid: Natural
    boot: Text
    """Id of the host's boot: CLOCK_MONOTONIC of two processes can be compared if theirs are equal."""
    monotonic_s: Instant
    unix_s: Instant


class Span(_Line, frozen=True, tag="span"):
    """Something that took time."""

    track: Track
    name: Text
    """Such as "denoiser", "step" or "load"."""
    began: Instant
    """Seconds of CLOCK_MONOTONIC."""
    ended: Instant
    attempts: tuple[Text, ...] = ()
    """The attempts that it was for, as `str(Attempt)`; more than one for a batch."""
    step: Natural = 0
    """Number of the step that it has ended with, of its first attempt; 0 if it is not a step."""
    total_steps: Natural = 0
    nbytes: Natural = 0
    """Bytes that were transferred."""
    error: Text = ""
    """Why it failed, or that it was cancelled."""


class JobHistory(_Line, frozen=True, tag="job"):
    """The states of a job that has ended, as the head saw them."""

    job: Text
    states: tuple[tuple[Text, Instant], ...]
    """Each state and when it began, in seconds since 1970."""


class Lost(_Line, frozen=True, tag="lost"):
    """Events that were not written because too many waited."""

    events: Natural


Event: TypeAlias = Span | JobHistory | Lost
Line: TypeAlias = TimelineProcess | Event


@dataclass(slots=True)
class Measured:
    """What the body of `Timeline.measure` finds out about its span."""

    nbytes: int = 0


class Timeline:
    """The events of this process that are not written yet. Used from the event loop's thread alone.

    Args:
        on: Whether events are kept; else they are only counted.
        capacity: Most events that wait to be written.
        exporter: Gets the spans of requests that are traced, too.
        instance: Whose they are.
    """

    def __init__(
        self,
        *,
        on: bool = False,
        capacity: int = MAX_BUFFERED,
        exporter: TraceExporter | None = None,
        instance: str = "",
    ) -> None:
        self.on = on
        self._exporter = exporter
        self._instance = instance
        self.recorded = 0
        """Events recorded so far, lost ones included."""
        self.lost = 0
        """Events that found no room."""
        self._told = 0
        self._capacity = capacity
        self._events: deque[Event] = deque()

    def add(self, event: Event) -> None:
        """Record an event."""
        if not self.on:
            return
        self.recorded += 1
        if len(self._events) < self._capacity:
            self._events.append(event)
        else:
            self.lost += 1

    def span(
        self,
        track: Track,
        name: str,
        began: float,
        *attempts: Attempt,
        ended: float | None = None,
        step: int = 0,
        total_steps: int = 0,
        nbytes: int = 0,
        error: str = "",
    ) -> None:
        """Record something that began at `began` and ended at `ended`, or just now, and count it in the metrics."""
        ended = time.monotonic() if ended is None else ended
        observe_span(track, name, max(0.0, ended - began), len(attempts), nbytes, failed=bool(error))
        if not (self.on or self._exporter):
            return
        event = Span(
            track=track,
            name=name,
            began=began,
            ended=max(began, ended),
            attempts=tuple(str(attempt) for attempt in attempts),
            step=step,
            total_steps=total_steps,
            nbytes=nbytes,
            error=error[:160],
        )
        self.add(event)
        if self._exporter:
            offset = time.time() - time.monotonic()
            self._exporter.export(trace_spans(event, attempts, self._instance, offset))

    @contextmanager
    def measure(self, track: Track, name: str, *attempts: Attempt, nbytes: int = 0) -> Iterator[Measured]:
        """Record the body of a `with` as a span; an exception in it is recorded and raised."""
        measured, began, error = Measured(nbytes), time.monotonic(), ""
        try:
            yield measured
        except BaseException as problem:
            error = f"{type(problem).__name__}: {problem}"
            raise
        finally:
            self.span(track, name, began, *attempts, nbytes=measured.nbytes, error=error)

    def take(self) -> list[Event]:
        """Return the events that wait, which wait no longer."""
        events, self._events = list(self._events), deque()
        if self.lost > self._told:
            events.append(Lost(events=self.lost - self._told))
            self._told = self.lost
        return events


def trace_spans(event: Span, attempts: Sequence[Attempt], instance: str, offset: float) -> Iterator[TraceSpan]:
    """Yield the spans of an event in the traces of its attempts: one for each that is traced.

    Args:
        event: What an instance has done.
        attempts: Whom it was for.
        instance: Name of the instance.
        offset: Seconds from CLOCK_MONOTONIC to those since 1970.
    """
    facts = {"bytes": event.nbytes, "step": event.step, "steps": event.total_steps}
    known: dict[str, AttributeValue] = {f"triptych.{key}": value for key, value in facts.items() if value}
    if event.track == "compute":
        known["triptych.batch"] = len(attempts)
    for attempt in attempts:
        context = context_of(attempt.job_id)
        if context is None:
            continue
        # The head knows no attempts of previews, which are decoded between other work.
        parent = denoise_of(attempt)[0].job_id if is_preview(attempt) else attempt_name(attempt, instance)
        yield TraceSpan(
            TraceContext(context.trace_id, new_span_id()),
            RUN if event.track == "stage" else event.name,
            event.began + offset,
            event.ended + offset,
            span_id_of(parent),
            {"triptych.instance": instance, "triptych.attempt": attempt.number, **known},
            event.error,
        )


def timeline_file(name: str) -> tuple[str, int, int] | None:
    """Return the component, generation and part of a file's name; None if it is no timeline."""
    match = _FILE.fullmatch(name)
    return (match["name"], int(match["generation"]), int(match["part"] or 1)) if match else None


class TimelineFiles:
    """The files of one incarnation of a component. Every method blocks on the disk and may raise `OSError`."""

    def __init__(self, folder: Path, process: TimelineProcess, *, part_bytes: int = PART_BYTES) -> None:
        self._folder = folder
        self._process = process
        self._part_bytes = part_bytes
        self._part = 0
        self._nbytes = 0
        self._path = folder

    def open(self) -> None:
        """Begin the next file, and remove the oldest ones of this component that are too many."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._part += 1
        part = "" if self._part == 1 else f".{self._part}"
        self._path = self._folder / f"{self._process.name}.{self._process.generation}{part}.jsonl"
        line = msgspec.json.encode(self._process) + b"\n"
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(line)
        self._nbytes = len(line)
        found = [(key[1:], path) for path in self._folder.iterdir() if (key := timeline_file(path.name))]
        mine = sorted((key, path) for key, path in found if path.name.startswith(f"{self._process.name}."))
        for _, path in mine[:-MAX_FILES]:
            path.unlink(missing_ok=True)

    def write(self, events: list[Event]) -> None:
        """Append events."""
        if self._nbytes >= self._part_bytes:
            self.open()
        lines = msgspec.json.Encoder().encode_lines(events)
        with self._path.open("ab") as file:
            file.write(lines)
        self._nbytes += len(lines)


class TimelineWriter(Actor):
    """Writes the events of its process to the disk, on a thread. A full disk ends the recording, and nothing else."""

    def __init__(self, component: Component, topology: Topology, timeline: Timeline) -> None:
        super().__init__(f"{component.name}{SUFFIX}")
        self.timeline = timeline
        self._component = component
        self._folder = topology.state_dir / TIMELINE
        self._files: TimelineFiles | None = None
        self._writing = asyncio.Lock()

    async def started(self) -> None:
        """Begin the file, and write to it from then on."""
        process = TimelineProcess(
            name=self._component.name,
            kind=self._component.kind,
            generation=self.generation,
            pid=os.getpid(),
            boot=await asyncio.to_thread(_boot_id),
            monotonic_s=time.monotonic(),
            unix_s=time.time(),
        )
        self._files = TimelineFiles(self._folder, process)
        await self._on_disk(self._files.open)
        self.spawn(self._write_loop(), name="write")

    async def stopping(self) -> None:
        """Write what is left: the other actors of this process have stopped."""
        await self.flush()

    def stats(self) -> dict[str, int | float | str | bool]:
        """Return how many events were recorded and lost, and whether they still are recorded."""
        return {"recorded": self.timeline.recorded, "lost": self.timeline.lost, "recording": self.timeline.on}

    async def flush(self) -> None:
        """Write the events that wait."""
        async with self._writing:
            events, files = self.timeline.take(), self._files
            if events and files and self.timeline.on:
                await self._on_disk(lambda: files.write(events))

    async def _write_loop(self) -> None:
        while self.timeline.on:
            await asyncio.sleep(WRITE_EVERY_S)
            await self.flush()

    async def _on_disk(self, write: Callable[[], None]) -> None:
        try:
            await asyncio.to_thread(write)
        except OSError as error:  # serving goes on without it
            self.timeline.on = False
            self.log.warning("the timeline ends here", folder=str(self._folder), error=str(error))


def timeline_of(
    component: Component, topology: Topology, exporter: TraceExporter | None = None
) -> tuple[Timeline, list[Actor]]:
    """Return the timeline of a process, and the actors that write and export it: none unless the topology asks for it.

    Args:
        component: The process.
        topology: The topology.
        exporter: Of its spans.
    """
    timeline = Timeline(on=topology.state.timeline, exporter=exporter, instance=component.name)
    writers: list[Actor] = [TimelineWriter(component, topology, timeline)] if timeline.on else []
    return timeline, [*writers, *([exporter] if exporter else [])]


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
