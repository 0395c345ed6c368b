"""A tiny model and one request for every pipeline class of diffusers.

Each module of this package has a function `samples()` that returns a list of `Sample`, one for each class; nothing else
has to be registered. A sample is a few lines:

    Sample("StableDiffusionImg2ImgPipeline", sd(), {**TEXT, "image": input_image(), "strength": 0.7})

`parts` says how each parameter of the class's `__init__` is made: a function makes a component, anything else is a
setting. Names that the class does not take are left out, so one set of parts serves many classes; the recipes of
`tools.make_model` are such sets (`flux.flux(vaes.kl, guidance_embeds=True).components`). What `parts` lacks is left to
its default, else made by the class that the type hint names, as `tiny_components.py` knows it (any scheduler, CLIP, T5,
the tokenizers), else None where the hint allows it. A class that cannot be made here says so by `unbuilt`, one that
needs a package that may not be installed by `needs`.

`inputs` are arguments of `__call__` without `generator` and `output_type`. Keep them small: 64 pixels or less, two or
three steps, five frames. `python -m triptych.tools.families classes --run --only NAME,NAME` shows how a class fares.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

__all__ = ["Sample", "by_class"]


@dataclass(frozen=True)
class Sample:
    """A tiny model of a pipeline class, and one request to it.

    Attributes:
        pipeline: Name of the class.
        parts: How each parameter of its `__init__` is made: a function makes a component, anything else is a setting.
        inputs: Of the request.
        needs: Python packages that the class imports beside those that are always there.
        unbuilt: Why no tiny model of it can be made; "" where one can.
    """

    pipeline: str
    parts: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    unbuilt: str = ""


@cache
def by_class() -> dict[str, Sample]:
    """All samples, by the name of their class.

    Raises:
        ValueError: Two are of one class.
    """
    found: dict[str, Sample] = {}
    for module in pkgutil.iter_modules(__path__):
        made = getattr(importlib.import_module(f"{__name__}.{module.name}"), "samples", list)
        for sample in made():
            if sample.pipeline in found:
                raise ValueError(f"There are two samples of {sample.pipeline}.")
            found[sample.pipeline] = sample
    return found
