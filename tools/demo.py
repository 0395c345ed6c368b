"""Start a system, request one image over HTTP, show where the time went, and stop it."""

from __future__ import annotations

import asyncio
import os
import time
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from triptych.actors.errors import TopologyError
from triptych.actors.runtime.logs import LEVEL_VARIABLE
from triptych.api.client import ClientError
from triptych.api.launch import launch

TOPOLOGY = Path(str(files("triptych"))) / "examples" / "demo.toml"
PROMPT = "a large red circle on the left of a blue background"
app = typer.Typer(add_completion=False, pretty_exceptions_show_locals=False)
console = Console()


@app.command(
    epilog='Example: python -m triptych.tools.demo examples/demo.toml -o out/demo.png --prompt "a small green ..."'
)
def main(
    topology: Annotated[Path, typer.Argument(help="What to start.")] = TOPOLOGY,
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the image goes.")] = Path("out/demo.png"),
    prompt: Annotated[str, typer.Option(help="What to draw.")] = PROMPT,
    seed: Annotated[int, typer.Option(help="The same seed gives the same image.")] = 7,
) -> None:
    """Start TOPOLOGY on a free port, make an image of PROMPT, and stop it."""
    try:
        asyncio.run(demo(topology, output, prompt, seed))
    except (ClientError, TopologyError) as error:
        console.print(f"[red]{error}[/red]")
        raise typer.Exit(1) from error


async def demo(topology: Path, output: Path, prompt: str, seed: int) -> None:
    """Run the demo; raises `ClientError` or `TopologyError` with a sentence."""
    os.environ.setdefault(LEVEL_VARIABLE, "warning")  # the image is the news here
    started = time.perf_counter()
    async with launch(topology, {"api": {"port": 0}}) as cluster:
        console.print(f"ready after {time.perf_counter() - started:.1f} s at {cluster.url}")
        asked = time.perf_counter()
        image = await cluster.generate(prompt, seed=seed)
        elapsed = time.perf_counter() - asked
        console.print(stage_table(await cluster.request(image.request_id), elapsed))
        output.parent.mkdir(parents=True, exist_ok=True)
        image.save(output)
    console.print(f'"{prompt}" is in {output}')


def stage_table(request: dict[str, Any], elapsed_s: float) -> Table:
    """Return a table of the seconds of a request, by stage and instance."""
    table = Table("stage", "instance", "milliseconds", title=f"request {request['id']}")
    unit = request["units"][0]
    for stage, seconds in unit["stage_seconds"].items():
        table.add_row(stage, unit["instances"].get(stage, ""), f"{seconds * 1000:.1f}")
    table.add_row("whole request", "over HTTP", f"{elapsed_s * 1000:.1f}", end_section=True)
    return table


if __name__ == "__main__":
    app()
