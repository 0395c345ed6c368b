"""`python -m triptych.tools.gpu_report --device cuda --budget 540 -o out/gpu.json --page docs/gpu.md`."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Final

import msgspec
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from triptych.tools.gpu_report.page import page, shown
from triptych.tools.gpu_report.report import GpuReport, Measured, RowResult, Status, read, replace, write
from triptych.tools.gpu_report.row_context import Settings
from triptych.tools.gpu_report.rows import ROWS, ReportRow, chosen
from triptych.tools.gpu_report.runner import INTERRUPTION, Interrupted, RowRunner

BUDGET_S: Final = 540.0
INTERRUPTED: Final = 130
_STYLES: Final = {Status.DONE: "green", Status.SKIPPED: "yellow", Status.FAILED: "red"}
_EXAMPLES: Final = """\
examples:
  python -m triptych.tools.gpu_report                                  all rows on the GPU, in under nine minutes
  python -m triptych.tools.gpu_report --shapes tiny --budget 240       the same with tiny models: does every row run?
  python -m triptych.tools.gpu_report --only flux,compile --compile    some rows, denoisers compiled
  python -m triptych.tools.gpu_report --device cpu --page docs/gpu.md  what there is to see without a GPU
  python -m triptych.tools.gpu_report --from gpu.json --page docs/gpu.md   the page of a run on another machine

rows, in the order in which they run:
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows; the exit status is 1 where one failed, 0 where the others were skipped, 130 after Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.source:
        if not options.page:
            parser.error("--from needs --page")
        try:
            made = read(options.source)
        except (OSError, msgspec.MsgspecError) as error:
            parser.error(f"--from {options.source}: {error}")
        replace(options.page, page(made).encode())
        return 0
    try:
        rows = chosen(options.only)
    except ValueError as error:
        parser.error(f"--only: {error}")
    return _run(options, rows)


def _run(options: argparse.Namespace, rows: Sequence[ReportRow]) -> int:
    device = "cuda:0" if options.device == "cuda" else options.device
    full = options.shapes == "full" if options.shapes else device != "cpu"
    modes = [f"attention {options.attention}"] if options.attention else []
    modes += ["compiled denoisers"] if options.compile else []
    began = datetime.now(UTC).isoformat(timespec="seconds")
    report = GpuReport(device, "full" if full else "tiny", began, options.budget, modes)
    # `timeout` and a shell that closes end it like Ctrl-C, which a shell lets its background jobs ignore: what was
    # measured is written.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    log = options.output.with_suffix(".log")
    log.write_bytes(b"")
    scratch = Path(tempfile.mkdtemp(prefix="triptych-gpu-", dir=options.scratch))
    settings = Settings(device, full, str(scratch), 0.0, options.attention, options.compile)
    if device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny tensors a second thread costs more than it computes
    try:
        return _rows(report, rows, settings, options, log)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        for folder in (scratch, Path("/dev/shm") / scratch.name):  # noqa: S108 - a name that is this run's own
            shutil.rmtree(folder, ignore_errors=True)


class _Progress:
    """Updates the file of the report and the terminal while rows run."""

    def __init__(self, report: GpuReport, output: Path) -> None:
        self.console = Console(highlight=False)
        self._report = report
        self._output = output
        self._began = time.monotonic()

    def begin(self, row: ReportRow, title: str) -> None:
        """Write to the file which row runs, for the case that this process is killed."""
        self._report.rows.append(RowResult(row.name, title, Status.FAILED, "The run ended in it."))
        self._keep()

    def add(self, measured: Measured) -> None:
        """Show a result of the row that runs."""
        self._report.rows[-1].values.append(measured)
        self._keep()
        self.console.print(f"    {measured.what}: {shown(measured)}", markup=False, soft_wrap=True)

    def end(self, result: RowResult) -> None:
        """Show how the row has ended."""
        self._report.rows[-1] = result
        self._keep()
        status = f"[{_STYLES[result.status]}]{result.status:8}[/]"
        self.console.print(f"{status} {result.title} ({result.seconds:.0f} s)", soft_wrap=True)
        if result.reason:
            self.console.print(f"    {result.reason}", markup=False, soft_wrap=True)

    def _keep(self) -> None:
        self._report.seconds = round(time.monotonic() - self._began, 1)
        write(self._report, self._output)


def _rows(
    report: GpuReport, rows: Sequence[ReportRow], settings: Settings, options: argparse.Namespace, log: Path
) -> int:
    seen = _Progress(report, options.output)
    run = RowRunner(settings, options.budget, log, seen.add)
    interrupted = False
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=seen.console, transient=True) as progress:
        for row, measure in run.rows(rows):
            task = progress.add_task(row.title)
            title = row.titled(full=settings.full)
            try:
                seen.begin(row, title)
                result = measure()
            except Interrupted as interruption:
                result, interrupted = interruption.result, True
            except KeyboardInterrupt:  # before or after its process
                result, interrupted = RowResult(row.name, title, Status.SKIPPED, INTERRUPTION), True
            seen.end(result)
            progress.remove_task(task)
            if interrupted:
                break
    if options.page:
        replace(options.page, page(report).encode())
    seen.console.print(f"{options.output} has the results, {log} what the rows printed.", soft_wrap=True)
    if interrupted:
        return INTERRUPTED
    return 1 if report.failed else 0


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _parser() -> argparse.ArgumentParser:
    rows = "\n".join(f"  {row.name:10} {row.title} (about {row.cuda_s:.0f} s)" for row in ROWS)
    parser = argparse.ArgumentParser(
        prog="python -m triptych.tools.gpu_report",
        description="Measure what Triptych gives on a GPU. Needs no network and no weights of a model.",
        epilog=_EXAMPLES + rows,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda", help='"cuda", "cuda:N" or "cpu" (default: cuda)')
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="for all rows (540)")
    parser.add_argument("-o", "--output", type=Path, default=Path("out/gpu.json"), help="(out/gpu.json)")
    parser.add_argument("--page", type=Path, help="write the page here as well, such as docs/gpu.md")
    parser.add_argument("--only", default="", metavar="ROW,...", help="some rows")
    parser.add_argument("--shapes", choices=["full", "tiny"], help="of the models (full, on the CPU tiny)")
    parser.add_argument(
        "--attention", default="", metavar="BACKEND", help="for denoisers in one process, by diffusers' name"
    )
    parser.add_argument("--compile", action="store_true", help="compile the blocks of denoisers in one process")
    parser.add_argument("--scratch", type=Path, help="a folder for 34 GB of weights, if /dev/shm has no room")
    parser.add_argument("--from", dest="source", type=Path, help="make just --page, of the results in this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
