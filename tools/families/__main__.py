"""`python -m triptych.tools.families`: how every pipeline of diffusers is served, and whether the bits are the same."""

from __future__ import annotations

import importlib.util
import json as json_text
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from triptych.tools.families import batches, page, survey
from triptych.tools.families import caches as step_caches
from triptych.tools.families.compare import compare
from triptych.tools.families.report import Result, markdown, table
from triptych.tools.families.rows import PipelineRow, rows
from triptych.tools.families.stage_processes import StageProcesses, silence_libraries, start_stage_processes

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False, no_args_is_help=True)
console = Console()
Json = Annotated[bool, typer.Option("--json", help="One JSON line for each row, no table.")]
Page = Annotated[Path | None, typer.Option("--markdown", help="Put the table into its part of this page.")]


@app.command(
    epilog="Examples: python -m triptych.tools.families classes --only StableDiffusionPipeline,IFPipeline --run"
    "  ·  python -m triptych.tools.families classes --run --results out/classes.jsonl --for-s 560"
    "  ·  python -m triptych.tools.families classes --results out/classes.jsonl --markdown docs/families.md"
)
def classes(
    run: Annotated[bool, typer.Option("--run", help="Run rows that the results do not have yet.")] = False,
    again: Annotated[bool, typer.Option("--again", help="With --run: those too that are not identical.")] = False,
    only: Annotated[str, typer.Option(help="Names of classes, or parts of them as *PAG*; by commas.")] = "",
    results: Annotated[Path | None, typer.Option(help="Rows that have run, in JSON lines; more are added.")] = None,
    row_s: Annotated[float, typer.Option(help="Seconds that one row may take.")] = 120.0,
    for_s: Annotated[float, typer.Option(help="Seconds after which no further row is begun.")] = 1e9,
    json: Json = False,
    into: Page = None,
) -> None:
    """Show every pipeline class; with --run, compare three processes and one with the class itself.

    The exit status is 1 where a row that ran is served in no way with the same bits.
    """
    chosen = [name for name in survey.classes() if survey.is_selected(name, only)]
    if not chosen:
        raise typer.BadParameter(f"no class is named like {only!r}", param_hint="--only")
    known = survey.read_records(results) if results else {}
    if run:
        silence_libraries()
        for record in survey.run(chosen, known, again=again, row_s=row_s, total_s=for_s):
            known[record.pipeline] = record
            if results:
                survey.append_record(results, record)
            print(msgspec.json.encode(record).decode() if json else page.line(record), flush=True)
    shown = [known[name] for name in chosen if name in known]
    if into:
        page.write(into, page.CLASSES, page.classes(shown))
    if not json:
        console.print(page.summary(shown))
    raise typer.Exit(1 if any(record.bad for record in shown) else 0)


@app.command(
    epilog="Examples: python -m triptych.tools.families blocks --only flux,wan"
    "  ·  python -m triptych.tools.families blocks --run --json"
    "  ·  python -m triptych.tools.families blocks --run --markdown docs/families.md"
)
def blocks(
    run: Annotated[bool, typer.Option("--run", help="Make tiny models and run them, apart and whole.")] = False,
    json: Json = False,
    only: Annotated[str, typer.Option(help="Parts of the names of families, or FAMILY:TASK; by commas.")] = "",
    into: Page = None,
) -> None:
    """Show every family and task of Modular Diffusers; with --run, compare three processes with diffusers alone.

    The exit status is 1 where a row that ran differs from the whole pipeline, or failed.
    """
    chosen = [row for row in rows() if _wanted(row, only)]
    if not chosen:
        raise typer.BadParameter(f"no family is named like {only!r}", param_hint="--only")
    results = [Result(row) for row in chosen]
    if run:
        results = list(_shown(chosen))
    if into:
        page.write(into, page.BLOCKS, markdown(results))
    if json:
        for result in results:
            print(json_text.dumps(result.record()))
    else:
        console.print(table(results))
    raise typer.Exit(1 if any(result.bad for result in results) else 0)


@app.command(
    epilog="Examples: python -m triptych.tools.families batch --only 'FluxModularPipeline:*' --json"
    "  ·  python -m triptych.tools.families batch --results out/batches.jsonl --for-s 560"
    "  ·  python -m triptych.tools.families batch --results out/batches.jsonl --for-s 0 --markdown docs/families.md"
)
def batch(
    only: Annotated[str, typer.Option(help="Rows as PIPELINE:TASK, or parts of them as *Wan*; by commas.")] = "",
    results: Annotated[Path | None, typer.Option(help="Rows that have run, in JSON lines; more are added.")] = None,
    row_s: Annotated[float, typer.Option(help="Seconds that one row may take.")] = 120.0,
    for_s: Annotated[float, typer.Option(help="Seconds after which no further row is begun.")] = 1e9,
    json: Json = False,
    into: Page = None,
) -> None:
    """Run each task with two other requests beside it: is it batched, how close to alone, with the same bits.

    The exit status is 1 where a row that ran is not close, or depends on the others.
    """
    chosen = [name for name in batches.names() if survey.is_selected(name, only)]
    if not chosen:
        raise typer.BadParameter(f"no row is named like {only!r}", param_hint="--only")
    silence_libraries()
    known = batches.read_records(results) if results else {}
    for record in batches.run(chosen, known, row_s=row_s, total_s=for_s):
        known[record.key] = record
        if results:
            batches.append_record(results, record)
        print(msgspec.json.encode(record).decode() if json else batches.line(record), flush=True)
    shown = [known[name] for name in chosen if name in known]
    if into:
        page.write(into, page.BATCHES, batches.markdown(shown))
    if not json:
        console.print(batches.summary(shown))
    raise typer.Exit(1 if any(record.bad for record in shown) else 0)


@app.command(
    epilog="Examples: python -m triptych.tools.families caches --only flux,wan --json"
    "  ·  python -m triptych.tools.families caches --results out/caches.jsonl --markdown docs/step-caches.md"
)
def caches(
    only: Annotated[str, typer.Option(help="Names of tiny models, or parts of them as *wan*; by commas.")] = "",
    results: Annotated[Path | None, typer.Option(help="Rows that have run, in JSON lines; more are added.")] = None,
    json: Json = False,
    into: Page = None,
) -> None:
    """Run two requests with each step cache, alone and in turns: which model takes it, and are the bits the same.

    The exit status is 1 where a row that ran is not as it is alone.
    """
    chosen = [name for name in step_caches.names() if survey.is_selected(name, only)]
    if not chosen:
        raise typer.BadParameter(f"no model is named like {only!r}", param_hint="--only")
    silence_libraries()
    known = step_caches.read_records(results) if results else {}
    for record in step_caches.run(chosen, known):
        known[record.key] = record
        if results:
            step_caches.append_record(results, record)
        told = msgspec.json.encode(record).decode() if json else f"{record.family}, {record.cache}: {record.cell}"
        print(told, flush=True)
    shown = [record for record in known.values() if record.family in chosen]
    if into:
        page.write(into, page.CACHES, step_caches.markdown(shown))
    raise typer.Exit(1 if any(record.bad for record in shown) else 0)


def _wanted(row: PipelineRow, only: str) -> bool:
    if not only:
        return True
    family = row.family.lower()
    return any(
        name.strip().lower() == f"{family}:{row.task}" or (":" not in name and name.strip().lower() in family)
        for name in only.split(",")
    )


def _shown(chosen: list[PipelineRow]) -> Iterator[Result]:
    silence_libraries()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # On standard error, so that JSON lines can go to a file.
    with (
        start_stage_processes() as processes,
        Progress(*columns, console=Console(stderr=True), transient=True) as progress,
    ):
        bar = progress.add_task("", total=len(chosen))
        for row in chosen:
            progress.update(bar, description=f"{row.family} {row.task}")
            yield _result(row, processes)
            progress.advance(bar)


def _result(row: PipelineRow, processes: StageProcesses) -> Result:
    if row.case is None:
        return Result(row)
    if lacking := [name for name in row.case.needs if importlib.util.find_spec(name) is None]:
        reason = f"not run: diffusers needs {' and '.join(lacking)} for it, which is not installed"
        return Result(replace(row, reason=reason))
    with tempfile.TemporaryDirectory(prefix="triptych-family-") as folder:
        try:
            return Result(row, compare(row.case, Path(folder), processes))
        except Exception as error:  # noqa: BLE001 - the reason of the row, and the exit status 1
            text = str(error).partition("\n")[0]
            return Result(replace(row, reason=f"{type(error).__name__}: {text}"), failed=True)


if __name__ == "__main__":
    app()
