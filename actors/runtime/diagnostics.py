"""Writes the mailboxes and tasks of a process to stderr, on SIGUSR1."""

from __future__ import annotations

import asyncio
import io
import sys
import traceback
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from triptych.actors.runtime.runtime import Runtime


def dump_tasks(runtime: Runtime, stream: TextIO | None = None) -> None:
    """Write every actor with its mailbox, then every task with what it waits for."""
    text = io.StringIO()
    for actor in runtime.inspection().actors:
        text.write(
            f"{actor.name} generation {actor.generation}: {actor.state} {actor.detail}"
            f" | mailbox {actor.mailbox_depth}/{actor.mailbox_capacity}, dead letters {actor.dead_letters}"
            f" | {actor.facts}\n"
        )
    for task in sorted(asyncio.all_tasks(), key=asyncio.Task.get_name):
        text.write(f"task {task.get_name()}\n")
        frames = ((frame, frame.f_lineno) for frame in _frames(task.get_coro()))
        text.writelines(traceback.StackSummary.extract(frames).format())
    stream = stream or sys.stderr
    stream.write(text.getvalue())
    stream.flush()


def _frames(awaited: Any) -> Iterator[FrameType]:
    """Yield the frames of a coroutine and of all that it awaits, outermost first; `get_stack` has only the first."""
    while awaited is not None:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is None:
            return
        yield frame
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
