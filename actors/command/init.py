"""`triptych init`: write a topology for a model and this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from rich.markup import escape

from triptych.actors.command._console import EXIT_BAD_TOPOLOGY, EXIT_FAILED, fail, stdout
from triptych.actors.errors import StartError
from triptych.actors.supervision import load_function, quiet_libraries
from triptych.actors.topology import (
    ModelSection,
    ModelSummary,
    for_device,
    generate_topology,
    relative_model_path,
    topology_file_name,
)

SUMMARIZE_MODEL: Final = "triptych.roles.worker.model_summary:summarize_model"
"""Returns a `ModelSummary` and why the model cannot be served, or ""; it imports the large libraries."""


def init(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder in the layout of diffusers, a checkpoint (.safetensors, .gguf), or the id of a repository"
            " that is in the local cache of the hub.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The topology file; default: named after the model."),
    ] = None,
    config: Annotated[
        str,
        typer.Option(help="With a checkpoint: folder or repository with the configurations of a model of its kind."),
    ] = "",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit of a repository.")] = "",
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(
            help="Where roles compute: on the GPUs that this machine has, else on the CPU; or on one of these."
        ),
    ] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a topology for a model and the GPUs of this machine, with a comment for each choice.

    The number of GPUs, their memory and the weights of each stage, as the headers of the files say, decide which role
    runs where. Nothing is downloaded: if files are missing, the error names the command that downloads them. Exits with
    2 when the model cannot be served, and with 1 when the topology cannot be written.

    [bold]Examples[/]

    triptych init /models/FLUX.1-dev -o flux.toml

    triptych init stabilityai/sdxl-turbo

    triptych init juggernautXL.safetensors --config stabilityai/stable-diffusion-xl-base-1.0
    """
    file = output or Path(topology_file_name(model))
    if file.exists() and not force:
        fail(f"{file} exists already: give another file with -o, or replace it with --force.", EXIT_FAILED)
    folder = file.resolve().parent
    section = ModelSection(
        path=relative_model_path(model, folder),
        config=config and relative_model_path(config, folder),
        revision=revision,
    )
    try:
        quiet_libraries()
        summarize: Callable[[ModelSection, Path], tuple[ModelSummary, str]] = load_function(SUMMARIZE_MODEL)
        facts, problem = summarize(section, folder)
    except StartError as error:
        fail(str(error), EXIT_BAD_TOPOLOGY)
    if problem:
        fail(problem, EXIT_BAD_TOPOLOGY)
    text = generate_topology(section, for_device(facts, device))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        fail(f"{file} cannot be written: {error.strerror or error}.", EXIT_FAILED)
    console = stdout()
    console.print(f"Wrote {escape(str(file))}:\n")
    console.print(escape(text))
    console.print("Next:")
    for command in (f"triptych check {file} --model", f"triptych up {file}", 'triptych generate "a red boat"'):
        console.print(f"  {escape(command)}")
