"""`python -m tools.make_model OUT --family flux`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools.make_model import Family, make_model


def main(
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    family: Annotated[Family, typer.Option(help="The pipeline it is for.")] = Family.FLUX,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Make a tiny model with random weights."""
    make_model(out, family, seed)
    print(f"A tiny {family} model is in {out}.")


if __name__ == "__main__":
    typer.run(main)
