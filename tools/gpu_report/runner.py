"""Run rows one after the other, each in a process of its own, within a budget of seconds."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from triptych.tools.gpu_report.report import Measured, RowResult, Status
from triptych.tools.gpu_report.row_context import Settings
from triptych.tools.gpu_report.row_process import Line, RowEnd
from triptych.tools.gpu_report.rows import ReportRow

ROOT: Final = Path(__file__).parents[3]
RESERVE_S: Final = 8.0
"""Seconds of the budget for ending the last row and writing the page."""
TERMINATE_S: Final = 5.0
"""Seconds in which a row may end before it is killed."""
INTERRUPTION: Final = "It was interrupted."
TAIL: Final = 300
"""Characters of the log that describe a process which crashed without a result."""
_VARIABLES: Final = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""For rows: no network, no output that is lost with a process, and the workspace that roles on a GPU have, as results
are compared with theirs byte by byte."""


@dataclass
class RowRunner:
    """Runs rows in processes of their own.

    Attributes:
        settings: For each row, but for its seconds.
        budget_s: Seconds for all of them.
        log: Takes what the rows print.
        on_result: Called with each result as it comes.
    """

    settings: Settings
    budget_s: float
    log: Path
    on_result: Callable[[Measured], None]

    def rows(self, rows: Sequence[ReportRow]) -> Iterator[tuple[ReportRow, Callable[[], RowResult]]]:
        """Yield each row with a function that runs it."""
        began = time.monotonic()
        for row in rows:
            left_s = self.budget_s - RESERVE_S - (time.monotonic() - began)
            yield row, partial(self._row, row, left_s)

    def _row(self, row: ReportRow, left_s: float) -> RowResult:
        device, title = self.settings.device, row.titled(full=self.settings.full)
        if left_s < row.estimate_s(device):
            reason = f"Of the time {max(left_s, 0):.0f} s were left, and it takes about {row.estimate_s(device):.0f}."
            return RowResult(row.name, title, Status.SKIPPED, reason)
        limit = min(row.limit_s(device), left_s)
        late = RowEnd(Status.FAILED, f"It was still running after {limit:.0f} s.")
        if limit < row.limit_s(device):
            late = RowEnd(Status.SKIPPED, f"The time was up after {limit:.0f} s of it.")
        settings = msgspec.structs.replace(self.settings, seconds=limit)
        text = msgspec.json.encode(settings).decode()
        command = [sys.executable, "-m", "triptych.tools.gpu_report.row_process", row.name]
        return run_process(
            RowResult(row.name, title, Status.FAILED),
            lambda descriptor: [*command, str(descriptor), text],
            limit,
            late,
            self.log,
            self.on_result,
        )


def run_process(
    result: RowResult,
    command: Callable[[int], list[str]],
    limit_s: float,
    late: RowEnd,
    log: Path,
    on_result: Callable[[Measured], None] = lambda measured: None,
) -> RowResult:
    """Run the process of a row and collect its results; it and its children have ended afterwards.

    Args:
        result: To be filled, and returned.
        command: Makes the command line of the descriptor that it is to write its lines to.
        limit_s: Seconds after which it is ended.
        late: How it has ended then.
        log: Takes its standard output and error.
        on_result: Called with each result.
    """
    began = time.monotonic()
    readable, writable = os.pipe()
    ended: RowEnd | None = None
    with log.open("ab") as output:
        output.write(f"\n===== {result.name}\n".encode())
        output.flush()
        mark = output.tell()
        process = subprocess.Popen(  # noqa: S603 - our own command
            command(writable),
            cwd=ROOT,
            env=environment(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=(writable,),
            start_new_session=True,
        )
    os.close(writable)
    try:
        for line in _lines(readable, began + limit_s):
            if line is None:
                ended = late
            elif line.measured is not None:
                result.values.append(line.measured)
                on_result(line.measured)
            else:
                ended = line.ended
        if ended is None:
            ended = RowEnd(Status.FAILED, describe_exit(_wait(process), _tail(log, mark)))
    except KeyboardInterrupt:
        ended = RowEnd(Status.SKIPPED, INTERRUPTION)
        raise Interrupted(result) from None
    finally:
        os.close(readable)
        _end(process)
        result.seconds = round(time.monotonic() - began, 1)
        if ended is not None:
            result.status, result.reason = ended.status, ended.reason
    return result


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of a row's process.

    Where Triptych is not installed, its roles find it by this: they import nothing from the folder that they start in.
    """
    paths = [str(Path(path).resolve()) for path in given.get("PYTHONPATH", "").split(os.pathsep) if path]
    return {**given, **_VARIABLES, "PYTHONPATH": os.pathsep.join([str(ROOT), *paths])}


class Interrupted(KeyboardInterrupt):
    """The run was interrupted in a row, whose result so far is given."""

    def __init__(self, result: RowResult) -> None:
        super().__init__()
        self.result = result


def describe_exit(code: int, tail: str) -> str:
    """Say how a process ended that sent no result; pure."""
    if code == -signal.SIGKILL:
        how = "Its process was killed, perhaps because the memory of the host ran out"
    elif code < 0:
        how = f"Its process was ended by {signal.Signals(-code).name}"
    else:
        how = f"Its process ended with code {code}"
    return f"{how}: {tail}" if tail else f"{how}."


def _lines(readable: int, until: float) -> Iterator[Line | None]:
    """Yield the lines of a pipe to its end; None if the time is over before."""
    decode = msgspec.json.Decoder(Line).decode
    rest = b""
    while True:
        left = until - time.monotonic()
        if left <= 0 or not select.select([readable], [], [], left)[0]:
            yield None
            return
        chunk = os.read(readable, 1 << 16)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in map(decode, lines):
            yield line
            if line.ended is not None:
                return


def _wait(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(TERMINATE_S)
    except subprocess.TimeoutExpired:
        return 0


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its session, also a cluster that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(TERMINATE_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _tail(log: Path, mark: int) -> str:
    with log.open("rb") as file:
        file.seek(mark)
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[-TAIL:] if lines else ""
