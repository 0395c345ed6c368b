"""The results of a run, as in its JSON file."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Final

import msgspec


class Status(StrEnum):
    """How a row ended."""

    DONE = "done"
    SKIPPED = "skipped"
    FAILED = "failed"


class Measured(msgspec.Struct, frozen=True):
    """One result of a row."""

    what: str
    """Its name, unique in its row."""
    value: float | str
    unit: str = ""
    """Such as "s" or "GB/s"; "" where the value is a text or a plain number."""
    note: str = ""
    """A remark for the reader."""


class RowResult(msgspec.Struct):
    """The result of a row."""

    name: str
    title: str
    status: Status
    reason: str = ""
    """Why it was skipped or has failed, a sentence."""
    seconds: float = 0.0
    values: list[Measured] = []
    """What it measured, also if it failed later."""


class GpuReport(msgspec.Struct):
    """A run of the command."""

    device: str
    shapes: str
    """"full" or "tiny"."""
    made_at: str
    """When it began, ISO 8601, UTC."""
    budget_s: float
    options: list[str] = []
    """The options that change how models run."""
    seconds: float = 0.0
    rows: list[RowResult] = []

    @property
    def failed(self) -> list[str]:
        """Names of the rows that failed."""
        return [row.name for row in self.rows if row.status is Status.FAILED]

    def row(self, name: str) -> RowResult | None:
        """Return the row of a name; None if there is none."""
        return next((row for row in self.rows if row.name == name), None)


_decoder: Final = msgspec.json.Decoder(GpuReport)


def write(report: GpuReport, path: Path) -> None:
    """Write the report atomically."""
    replace(path, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def read(path: Path) -> GpuReport:
    """Read a report; raises OSError and msgspec.DecodeError."""
    return _decoder.decode(path.read_bytes())


def replace(path: Path, content: bytes) -> None:
    """Replace a file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    beside.replace(path)
