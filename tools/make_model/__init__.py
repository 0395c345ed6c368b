"""Make a tiny model with random weights: `python -m triptych.tools.make_model OUT --family flux`.

Everything is made here from a few numbers, nothing is downloaded. The folder has the layout of diffusers, with
tokenizers that know every byte, and a serving config. The same seed makes the same files. Its images are coloured
noise, but they depend on the prompt, the seed and each parameter as those of a real model do. A model is tiny, unless
another size is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from rich.progress import track
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from triptych.engines.parameters.serving_config import SERVING_CONFIG_NAME
from triptych.tools.make_model import (
    classic_pipelines,
    cosmos,
    flux,
    ideogram,
    image_models,
    ltx_hunyuan,
    minimax,
    qwen,
    stable_diffusion,
    vaes,
    wan,
)
from triptych.tools.make_model.recipe import Recipe, Size
from triptych.tools.make_model.text import TEXT_LENGTH

__all__ = [
    "CLASSIC",
    "TEXT_LENGTH",
    "Family",
    "Size",
    "SizeError",
    "make_model",
    "randomise_zero_layers",
    "write_model",
]


class Family(StrEnum):
    """Which pipeline the model is for."""

    FLUX = "flux"
    FLUX_KL = "flux-kl"
    FLUX_KONTEXT = "flux-kontext"
    FLUX2 = "flux2"
    FLUX2_KLEIN = "flux2-klein"
    FLUX2_KLEIN_BASE = "flux2-klein-base"
    FLUX3 = "flux3"
    FLUX3_DISTILLED = "flux3-distilled"
    WAN = "wan"
    WAN_I2V = "wan-i2v"
    WAN_FLF2V = "wan-flf2v"
    WAN22 = "wan22"
    WAN22_I2V = "wan22-i2v"
    WAN22_VACE = "wan22-vace"
    WAN_ANIMATE2 = "wan-animate-2"
    WAN_ANIMATE2_DISTILLED = "wan-animate-2-distilled"
    QWENIMAGE = "qwenimage"
    QWENIMAGE_EDIT = "qwenimage-edit"
    QWENIMAGE_EDIT_PLUS = "qwenimage-edit-plus"
    QWENIMAGE_LAYERED = "qwenimage-layered"
    SD3 = "sd3"
    SDXL = "sdxl"
    SDXL_UNION = "sdxl-union"
    LTX = "ltx"
    LTX2 = "ltx2"
    LTX25 = "ltx25"
    ECHO = "echo"
    HUNYUAN_VIDEO15 = "hunyuan_video1_5"
    HELIOS = "helios"
    HELIOS_PYRAMID = "helios-pyramid"
    HELIOS_PYRAMID_DISTILLED = "helios-pyramid-distilled"
    Z_IMAGE = "z_image"
    IDEOGRAM4 = "ideogram4"
    QWENIMAGE21 = "qwenimage21"
    QWENIMAGE21_TURBO = "qwenimage21-turbo"
    KREA2 = "krea2"
    KREA2_TURBO = "krea2-turbo"
    ANIMA = "anima"
    ERNIE_IMAGE = "ernie_image"
    COSMOS3 = "cosmos3"
    COSMOS3_DISTILLED = "cosmos3-distilled"
    MINIMAX_H3 = "minimax-h3"
    MINIMAX_MUSIC3 = "minimax-music3"
    PIXART = "pixart"
    SANA = "sana"
    CHROMA = "chroma"
    COGVIDEOX = "cogvideox"
    GLM_IMAGE = "glm_image"
    KANDINSKY5 = "kandinsky5"
    SD_CONTROLNET = "sd_controlnet"


_RECIPES: Final[dict[Family, Callable[[], Recipe]]] = {
    Family.FLUX: lambda: flux.flux(vaes.tiny, guidance_embeds=False),
    Family.FLUX_KL: lambda: flux.flux(vaes.kl, guidance_embeds=True),
    Family.FLUX_KONTEXT: flux.kontext,
    Family.FLUX2: flux.flux2,
    Family.FLUX2_KLEIN: lambda: flux.klein(distilled=True),
    Family.FLUX2_KLEIN_BASE: lambda: flux.klein(distilled=False),
    Family.FLUX3: lambda: flux.flux3(distilled=False),
    Family.FLUX3_DISTILLED: lambda: flux.flux3(distilled=True),
    Family.WAN: wan.t2v,
    Family.WAN_I2V: wan.i2v,
    Family.WAN_FLF2V: wan.flf2v,
    Family.WAN22: lambda: wan.t2v(experts=2),
    Family.WAN22_I2V: lambda: wan.i2v(experts=2),
    Family.WAN22_VACE: wan.vace,
    Family.WAN_ANIMATE2: lambda: wan.animate2(distilled=False),
    Family.WAN_ANIMATE2_DISTILLED: lambda: wan.animate2(distilled=True),
    Family.QWENIMAGE: qwen.qwenimage,
    Family.QWENIMAGE_EDIT: qwen.edit,
    Family.QWENIMAGE_EDIT_PLUS: qwen.edit_plus,
    Family.QWENIMAGE_LAYERED: qwen.layered,
    Family.SD3: stable_diffusion.sd3,
    Family.SDXL: stable_diffusion.sdxl,
    Family.SDXL_UNION: stable_diffusion.sdxl_union,
    Family.LTX: ltx_hunyuan.ltx,
    Family.LTX2: ltx_hunyuan.ltx2,
    Family.LTX25: ltx_hunyuan.ltx25,
    Family.ECHO: ltx_hunyuan.echo,
    Family.HUNYUAN_VIDEO15: ltx_hunyuan.hunyuan_video,
    Family.HELIOS: lambda: wan.helios("HeliosPipeline", wan.helios_flat),
    Family.HELIOS_PYRAMID: lambda: wan.helios("HeliosPyramidModularPipeline", wan.helios_pyramid),
    Family.HELIOS_PYRAMID_DISTILLED: lambda: wan.helios("HeliosPyramidDistilledModularPipeline", wan.helios_distilled),
    Family.Z_IMAGE: image_models.z_image,
    Family.IDEOGRAM4: ideogram.ideogram4,
    Family.QWENIMAGE21: lambda: ideogram.qwenimage21(turbo=False),
    Family.QWENIMAGE21_TURBO: lambda: ideogram.qwenimage21(turbo=True),
    Family.KREA2: lambda: image_models.krea2(turbo=False),
    Family.KREA2_TURBO: lambda: image_models.krea2(turbo=True),
    Family.ANIMA: image_models.anima,
    Family.ERNIE_IMAGE: image_models.ernie,
    Family.COSMOS3: cosmos.omni,
    Family.COSMOS3_DISTILLED: cosmos.distilled,
    Family.MINIMAX_H3: minimax.h3,
    Family.MINIMAX_MUSIC3: minimax.music3,
    Family.PIXART: classic_pipelines.pixart,
    Family.SANA: classic_pipelines.sana,
    Family.CHROMA: classic_pipelines.chroma,
    Family.COGVIDEOX: classic_pipelines.cogvideox,
    Family.GLM_IMAGE: classic_pipelines.glm_image,
    Family.KANDINSKY5: classic_pipelines.kandinsky5,
    Family.SD_CONTROLNET: classic_pipelines.sd_controlnet,
}
CLASSIC: Final = frozenset(family for family in Family if _RECIPES[family].__module__ == classic_pipelines.__name__)
"""Families of pipelines that diffusers does not have in blocks."""


_LARGER: Final[dict[tuple[Family, Size], Callable[[], Recipe]]] = {
    (Family.FLUX_KL, Size.MID): flux.mid,
    (Family.FLUX_KL, Size.FULL): flux.full,
}


class SizeError(ValueError):
    """A family is not made in the size that was asked for."""


def make_model(out: Path, family: Family, seed: int = 0, *, size: Size = Size.TINY, progress: bool = True) -> None:
    """Make a model.

    Args:
        out: Its folder, made if need be; files of the same names are replaced.
        family: "flux" has a tiny VAE and no guidance embedding, "flux-kl" a KL VAE and guidance as the original has;
            the others are as their originals.
        seed: Of the weights.
        size: Of the weights; only some families have another than the tiny one.
        progress: Whether a bar is shown.

    Raises:
        SizeError: There is no such family in that size.
    """
    name = "flux" if family is Family.FLUX_KL else family.value
    write_model(out, name, _recipe(family, size), seed, progress=progress)


def write_model(
    out: Path,
    name: str,
    recipe: Recipe,
    seed: int,
    *,
    progress: bool,
    save: Callable[[Any, Path], None] = lambda component, folder: component.save_pretrained(folder),
) -> None:
    """Make a model of a recipe.

    Args:
        out: Its folder, made if need be; files of the same names are replaced.
        name: Its family.
        recipe: What it is made of.
        seed: Of the weights.
        progress: Whether a bar is shown.
        save: Writes a component to its folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()  # One bar is enough.
    index: dict[str, object] = {"_class_name": recipe.pipeline, **recipe.settings}
    parts = track(recipe.components.items(), "Making components", total=len(recipe.components), disable=not progress)
    for number, (part, make) in enumerate(parts):
        # Each component has its own seed, so that a change of one leaves the others as they are.
        torch.manual_seed(seed * 1000 + number)
        with _weights_of(recipe.dtype):
            component = make() if make else None
        if component is not None:
            if recipe.randomise_zero_layers:
                randomise_zero_layers(component)
            save(component, out / part)
        index[part] = _index_entry(component)
    for file, tensors in recipe.files.items():
        torch.manual_seed(seed)
        (out / file).parent.mkdir(exist_ok=True)
        save_file(tensors(), out / file)
    _write(out / "model_index.json", index)
    _write(out / SERVING_CONFIG_NAME, _serving_config(name, recipe))


def randomise_zero_layers(component: object) -> None:
    """Give random weights to layers that begin as zeros: neither prompt nor step would change the image."""
    if isinstance(component, torch.nn.Module):
        for parameter in component.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)


@contextmanager
def _weights_of(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _recipe(family: Family, size: Size) -> Recipe:
    if size is Size.TINY:
        return _RECIPES[family]()
    if (family, size) not in _LARGER:
        made = ", ".join(known for known, its_size in _LARGER if its_size is size)
        raise SizeError(f"There is no {family} of the size {size}, only: {made}.")
    return _LARGER[family, size]()


def _serving_config(name: str, recipe: Recipe) -> dict[str, object]:
    return {
        "name": f"{recipe.size}-{name}",
        "family": name,
        "task": recipe.task,
        "defaults": recipe.defaults,
        "ranges": {**recipe.ranges, "num_inference_steps": [1, 50]},
    }


def _index_entry(component: object) -> list[str | None]:
    if component is None:
        return [None, None]
    # Its class has another name in each major version of transformers; this one stays.
    if isinstance(component, PreTrainedTokenizerFast):
        return ["transformers", "PreTrainedTokenizerFast"]
    module = type(component).__module__.split(".")
    # Parts that belong to one pipeline are named by its package.
    library = module[2] if module[:2] == ["diffusers", "pipelines"] else module[0]
    return [library, type(component).__name__]


def _write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
