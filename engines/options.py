"""How a model is read and cut: what a topology may say of it beside its folder. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The same for every process that serves a model; the defaults serve it as its files say."""

    task: str = ""
    """A workflow of the pipeline, or "any", in place of that of the model's card; "" for that."""
    route: str = ""
    """"modular" or "classic", see `engines.routes.Route`; "" for the best that the model has."""
    variant: str = ""
    """Which variant of weight files is read, such as "fp16", of the components that have it; see
    `engines.weight_files.choose_variant`."""
    checkpoint: Path | None = None
    """A file with the weights of several components, which go before those in the folder of the model."""
    components: Mapping[str, Path] = {}
    """By name, a file with the weights of a component, or a folder with its weights and its configuration, in place of
    the model's own."""


DEFAULTS: Final = ModelOptions()
