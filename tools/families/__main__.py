"""`python -m tools.families`: every family and task, how it is served, and whether splitting it changes a bit."""

from __future__ import annotations

import importlib.util
import json as json_text
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tools.families.apart import Apart, apart, quiet
from tools.families.compare import compare
from tools.families.report import Result, markdown, table
from tools.families.rows import Row, rows

app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
console = Console()


@app.command(
    epilog="Examples: python -m tools.families --only flux,wan  ·  python -m tools.families --run --json"
    "  ·  python -m tools.families --run --markdown docs/families.md"
)
def main(
    run: Annotated[bool, typer.Option("--run", help="Make tiny models and run them, apart and whole.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON line for each row, no table.")] = False,
    only: Annotated[str, typer.Option(help="Parts of the names of families, or FAMILY:TASK; by commas.")] = "",
    into: Annotated[Path | None, typer.Option("--markdown", help="Write the table here, as Markdown.")] = None,
) -> None:
    """Show every family and task of Modular Diffusers, and with --run that three processes change nothing.

    The exit status is 1 where a row that ran differs from the whole pipeline, or failed.
    """
    chosen = [row for row in rows() if _wanted(row, only)]
    if not chosen:
        raise typer.BadParameter(f"no family is named like {only!r}", param_hint="--only")
    results = [Result(row) for row in chosen]
    if run:
        results = list(_shown(chosen))
    if into:
        into.write_text(markdown(results, ran=run))
    if json:
        for result in results:
            print(json_text.dumps(result.record()))
    else:
        console.print(table(results))
    raise typer.Exit(1 if any(result.bad for result in results) else 0)


def _wanted(row: Row, only: str) -> bool:
    if not only:
        return True
    family = row.family.lower()
    return any(
        name.strip().lower() == f"{family}:{row.task}" or (":" not in name and name.strip().lower() in family)
        for name in only.split(",")
    )


def _shown(chosen: list[Row]) -> Iterator[Result]:
    quiet()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # On standard error, so that JSON lines can go to a file.
    with apart() as processes, Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=len(chosen))
        for row in chosen:
            progress.update(bar, description=f"{row.family} {row.task}")
            yield _result(row, processes)
            progress.advance(bar)


def _result(row: Row, processes: Apart) -> Result:
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
