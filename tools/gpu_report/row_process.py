"""The process of one row: `python -m triptych.tools.gpu_report.row_process ROW DESCRIPTOR SETTINGS`.

It writes a JSON line for each result to a descriptor of its parent's, and a last one that says how the row ended. Both
come at once, so that a crash leaves what was measured before it.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Final

import msgspec

from triptych.actors.supervision import die_with_parent
from triptych.tools.gpu_report.report import Measured, Status
from triptych.tools.gpu_report.row_context import RowContext, RowFailedError, RowSkippedError, Settings
from triptych.tools.gpu_report.rows import ReportRow, chosen

OUR_PACKAGE: Final = "triptych"


class RowEnd(msgspec.Struct, frozen=True):
    """How a row ended."""

    status: Status
    reason: str = ""


class Line(msgspec.Struct, frozen=True):
    """What the parent reads: one of the two."""

    measured: Measured | None = None
    ended: RowEnd | None = None


def run(row: ReportRow, settings: Settings, emit: Callable[[Measured], None]) -> RowEnd:
    """Run a row in this process; an error becomes a sentence."""
    try:
        if settings.device.startswith("cuda"):
            _require_cuda(settings.device)
        row.load()(RowContext(settings, emit))
    except RowSkippedError as error:
        return RowEnd(Status.SKIPPED, str(error))
    except RowFailedError as error:
        return RowEnd(Status.FAILED, str(error))
    except ModuleNotFoundError as error:
        traceback.print_exc()
        if (error.name or "").partition(".")[0] == OUR_PACKAGE:
            return RowEnd(Status.FAILED, str(error))
        return RowEnd(Status.SKIPPED, f"The package {error.name} is not installed here.")
    except Exception as error:  # noqa: BLE001 - the report has one line for it, the log all of it
        traceback.print_exc()
        return RowEnd(Status.FAILED, one_line(error))
    return RowEnd(Status.DONE)


def one_line(error: BaseException) -> str:
    """Return an error as one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def _require_cuda(device: str) -> None:
    import torch

    index = torch.device(device).index or 0
    if index >= torch.cuda.device_count() or not torch.cuda.is_available():
        raise RowFailedError(f"torch {torch.__version__} finds no {device} here.")


def main(arguments: list[str]) -> int:
    """Run the row; the exit status is 0 unless the process itself fails."""
    die_with_parent()
    name, descriptor, settings = arguments
    encode = msgspec.json.Encoder().encode

    def tell(line: Line) -> None:
        os.write(int(descriptor), encode(line) + b"\n")

    (row,) = chosen(name)
    ended = run(row, msgspec.json.decode(settings, type=Settings), lambda measured: tell(Line(measured=measured)))
    tell(Line(ended=ended))
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a row that hang must not keep its process.
    os._exit(status)
