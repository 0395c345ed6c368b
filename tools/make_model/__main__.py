"""`python -m triptych.tools.make_model OUT --family flux`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from triptych.tools.make_model import Family, Size, SizeError, make_model


def main(
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    family: Annotated[Family, typer.Option(help="The pipeline it is for.")] = Family.FLUX,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
    size: Annotated[Size, typer.Option(help="Of the weights; flux-kl has them of 2 and of 34 GB as well.")] = Size.TINY,
) -> None:
    """Make a model with random weights."""
    try:
        make_model(out, family, seed, size=size)
    except SizeError as error:
        raise typer.BadParameter(str(error), param_hint="--size") from error
    print(f"A {size} {family} model is in {out}.")


if __name__ == "__main__":
    typer.run(main)
