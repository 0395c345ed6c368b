"""Make a tiny model of a pipeline without blocks: `python -m triptych.tools.make_classic OUT --family pixart`.

As `tools.make_model` does it, with random weights and a serving config. The same seed makes the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer

from triptych.tools.make_model import classic_pipelines, write_model
from triptych.tools.make_model.recipe import Recipe


class ClassicFamily(StrEnum):
    """Which pipeline the model is for."""

    PIXART = "pixart"
    SANA = "sana"
    CHROMA = "chroma"
    COGVIDEOX = "cogvideox"
    GLM_IMAGE = "glm_image"
    KANDINSKY5 = "kandinsky5"
    SD_CONTROLNET = "sd_controlnet"


_RECIPES: Final[dict[ClassicFamily, Callable[[], Recipe]]] = {
    ClassicFamily.PIXART: classic_pipelines.pixart,
    ClassicFamily.SANA: classic_pipelines.sana,
    ClassicFamily.CHROMA: classic_pipelines.chroma,
    ClassicFamily.COGVIDEOX: classic_pipelines.cogvideox,
    ClassicFamily.GLM_IMAGE: classic_pipelines.glm_image,
    ClassicFamily.KANDINSKY5: classic_pipelines.kandinsky5,
    ClassicFamily.SD_CONTROLNET: classic_pipelines.sd_controlnet,
}


def make_classic(out: Path, family: ClassicFamily, seed: int = 0) -> None:
    """Make a model.

    Args:
        out: Its folder, made if need be; files of the same names are replaced.
        family: PixArt-Sigma, Sana, Chroma, GLM-Image or Stable Diffusion 1.5 with a ControlNet, which make images, or
            CogVideoX or Kandinsky 5, which make videos.
        seed: Of the weights.
    """
    write_model(out, family, _RECIPES[family](), seed, progress=False, finish=_randomise_zero_layers)


def _randomise_zero_layers(component: Any) -> None:
    if not isinstance(component, torch.nn.Module):
        return
    # Some layers begin as zeros, so that neither prompt nor step would change the picture.
    for parameter in component.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)


def main(
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    family: Annotated[ClassicFamily, typer.Option(help="The pipeline it is for.")] = ClassicFamily.PIXART,
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Make a tiny model with random weights."""
    make_classic(out, family, seed)
    print(f"A tiny {family} model is in {out}.")


if __name__ == "__main__":
    typer.run(main)
