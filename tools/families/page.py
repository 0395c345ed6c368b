"""Write the page `docs/families.md`: a part each for classes, blocks and batches, by its own run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import diffusers
import torch
import transformers

from triptych.tools.families.survey import SurveyRecord, Trial

CLASSES: Final = "classes"
BLOCKS: Final = "blocks"
BATCHES: Final = "batches"
CACHES: Final = "caches"
_COLUMNS: Final = ("class", "task", "route", "three processes", "one process", "why not")


def write(path: Path, part: str, text: str) -> None:
    """Replace a part of the page, which stands between two comments that name it.

    Raises:
        ValueError: The page has no such part.
    """
    found = re.compile(rf"(<!-- {part} -->\n).*(<!-- end of {part} -->)", re.DOTALL)
    page = path.read_text()
    if not found.search(page):
        raise ValueError(f"{path} has no part between `<!-- {part} -->` and `<!-- end of {part} -->`.")
    path.write_text(found.sub(lambda match: f"{match[1]}\n{text}\n{match[2]}", page))


def line(record: SurveyRecord) -> str:
    """Return a row for a terminal."""
    if record.unbuilt:
        return f"{record.pipeline}: not built: {record.unbuilt} ({record.seconds} s)"
    ways = f"three processes {_verdict(record.by_three)}, one process {_verdict(record.by_one)}"
    why = _why(record)
    return f"{record.pipeline}: {record.task}; {record.route}; {ways}{f'; {why}' if why else ''} ({record.seconds} s)"


def summary(records: Sequence[SurveyRecord]) -> str:
    """Return the totals in sentences."""
    built = [record for record in records if not record.unbuilt]
    served = [record for record in built if record.by_three.served or record.by_one.served]
    same = [record for record in built if not record.bad]
    apart = [record.by_three for record in built]
    one = [record.by_one for record in built]
    return (
        f"{len(records)} classes; {len(built)} of them can be built tiny. Of those"
        f" {_share(len(served), len(built))} are served and {_share(len(same), len(built))} with the bits of the class:"
        f" {sum(trial.served for trial in apart)} by three processes ({sum(trial.identical for trial in apart)} of them"
        f" identical), {sum(trial.served for trial in one)} by one ({sum(trial.identical for trial in one)} identical);"
        f" {sum(record.route == 'monolithic' for record in built)} cannot be cut."
    )


def classes(records: Sequence[SurveyRecord]) -> str:
    """Return the part of the page with a row for every class."""
    built = [record for record in records if not record.unbuilt]
    unbuilt = [record for record in records if record.unbuilt]
    lines = [
        f"Made with diffusers {diffusers.__version__}, transformers {transformers.__version__} and torch"
        f" {torch.__version__}.",
        "",
        summary(records),
        "",
        f"| {' | '.join(_COLUMNS)} |",
        f"|{' --- |' * len(_COLUMNS)}",
        *(f"| {' | '.join(map(_literal, _cells(record)))} |" for record in built),
    ]
    if unbuilt:
        lines += ["", "Not built:", "", "| class | why not |", "| --- | --- |"]
        lines += [f"| {_short(record)} | {_literal(record.unbuilt)} |" for record in unbuilt]
    return "\n".join(lines) + "\n"


def _literal(text: str) -> str:
    """Escape what Markdown would read as a column or a link."""
    return text.replace("|", "/").replace("[", "\\[")


def _cells(record: SurveyRecord) -> tuple[str, ...]:
    return (
        _short(record),
        record.task,
        record.route if record.classic_cut is None else f"{record.route}; classic",
        _verdict(record.by_three),
        _verdict(record.by_one),
        _why(record),
    )


def _short(record: SurveyRecord) -> str:
    return record.pipeline.removesuffix("Pipeline")


def _verdict(trial: Trial) -> str:
    if trial.identical:
        return "identical"
    return "differs" if trial.served else "no"


def _why(record: SurveyRecord) -> str:
    reasons = dict.fromkeys(trial.why for trial in (record.by_three, record.by_one) if trial.why)
    if record.classic_cut:
        blocks = dict.fromkeys(trial.why for trial in (record.cut, record.whole) if trial.why)
        return "; ".join([f"by blocks: {', '.join(blocks)}", *reasons])
    return "; ".join(reasons)


def _share(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.1%})" if whole else str(part)
