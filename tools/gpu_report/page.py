"""Make the page `docs/gpu.md` from a report; pure."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Final

from triptych.tools.gpu_report.published_figures import FIGURES
from triptych.tools.gpu_report.report import GpuReport, Measured, RowResult, Status

_WIDTH: Final = 120
_COMMAND: Final = "make gpu-report"
_MACHINE: Final = "machine"
_NOTHING_YET: Final = """
**Nothing has been measured on a GPU yet.** This page was made on a CPU, with tiny shapes: it shows that every row runs
and what it will say. None of its seconds tells anything of a GPU, so no figures of others stand beside them.
"""
_TINY: Final = """
**The models had tiny shapes.** This run shows that every row works on this GPU; none of its seconds is that of a real
model, so no figures of others stand beside them.
"""
_RANDOM: Final = """
Models have random weights at the shapes of their originals: the seconds of a step do not depend on what the weights are
([why](adr/0019-gpu-benchmarks-with-random-weights.md)). Figures of others are their owners' own, on the GPU that is
named; nobody here has measured them again.
"""


def page(report: GpuReport) -> str:
    """Return the page as Markdown."""
    paragraphs = [_fill(text) for text in _introduction(report)]
    return "\n\n".join(["# On a GPU", *paragraphs, *_sections(report)]) + "\n"


def _introduction(report: GpuReport) -> Iterator[str]:
    if report.device == "cpu":
        yield _NOTHING_YET
    elif report.shapes != "full":
        yield _TINY
    options = f" with {', '.join(report.options)}" if report.options else ""
    yield f"""
    `{_COMMAND}` makes this page in under {_minutes(report.budget_s)} minutes;
    [what to type](gpu-run.md) where a GPU is at hand for half an hour. This one
    began at {report.made_at} on {_machine(report)}{options}, and took {report.seconds:.0f} s.
    """
    if report.shapes == "full":
        yield _RANDOM


def _sections(report: GpuReport) -> Iterator[str]:
    yield "\n".join([*_results(report)])
    if ended := [row for row in report.rows if row.status is not Status.DONE]:
        yield "## Skipped and failed"
        lines = [f"| {row.title} | {row.status} | {_cell(row.reason)} |" for row in ended]
        yield "\n".join(["| row | | why |", "| --- | --- | --- |", *lines])


def _results(report: GpuReport) -> Iterator[str]:
    compared = report.shapes == "full"
    yield "| | measured | remarks |" + (" others | whose, where published |" if compared else "")
    yield "| --- | ---: | --- |" + (" ---: | --- |" if compared else "")
    for row in report.rows:
        if not row.values:
            continue
        yield f"| **{row.title}** | | |" + (" | |" if compared else "")
        for measured in row.values:
            yield _line(row, measured, compared=compared)


def _line(row: RowResult, measured: Measured, *, compared: bool) -> str:
    line = f"| {_cell(measured.what)} | {_cell(shown(measured))} | {_cell(measured.note)} |"
    if not compared:
        return line
    figure = FIGURES.get((row.name, measured.what))
    return line + (f" {figure.value} | {figure.owner}; {figure.source} |" if figure else " | |")


def shown(measured: Measured) -> str:
    """Return a value with its unit."""
    if isinstance(measured.value, str):
        return measured.value
    number = f"{measured.value:,.0f}" if measured.value == int(measured.value) else f"{measured.value:,.4g}"
    return f"{number} {measured.unit}".strip()


def _machine(report: GpuReport) -> str:
    row = report.row(_MACHINE)
    known = {measured.what: shown(measured) for measured in row.values} if row else {}
    what = known.get("GPU") or known.get("processor") or "an unknown machine"
    versions = [f"{name} {known[name]}" for name in ("torch", "diffusers", "transformers") if name in known]
    return f"{report.device} ({', '.join([what, *versions])})"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def _fill(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), _WIDTH, break_on_hyphens=False, break_long_words=False)
