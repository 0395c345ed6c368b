"""How a model is read and cut: what a topology may say of it beside its folder. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

OptionValue: TypeAlias = bool | int | float | str | tuple[int | float, ...] | None


class ComponentOptions(msgspec.Struct, frozen=True):
    """What takes the place of a component of a model."""

    class_name: str = ""
    """Its class, "" for that of the model."""
    options: tuple[tuple[str, OptionValue], ...] = ()
    """What is otherwise than in the configuration of the model, by name."""

    @classmethod
    def of(cls, table: Mapping[str, OptionValue]) -> ComponentOptions:
        """Make it of a table of a topology, where `class` is the name of the class."""
        return cls(str(table.get("class", "")), tuple((name, table[name]) for name in sorted(table) if name != "class"))


class EmbeddingFile(msgspec.Struct, frozen=True):
    """A word that the text encoders of a model are taught when it is loaded."""

    token: str
    """The word, as prompts have it."""
    path: Path
    """A `.safetensors` file with its vectors."""


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The same for every process that serves a model; the defaults serve it as its files say."""

    task: str | tuple[str, ...] = ""
    """A task, several, or "any", in place of those of the model's serving config; "" or none for those."""
    route: str = ""
    """"modular" or "classic", see `engines.routes.PartitionStrategy`; "" for the best that the model has."""
    variant: str = ""
    """Which variant of weight files is read, such as "fp16", of the components that have it; see
    `engines.weight_files.choose_variant`."""
    scheduler: ComponentOptions = ComponentOptions()
    """Of all requests that choose none."""
    guider: ComponentOptions = ComponentOptions()
    """Likewise, of all guiders."""
    vae_tiling: bool = False
    """The VAE computes in tiles."""
    vae_tiling_options: tuple[tuple[str, OptionValue], ...] = ()
    """Sizes of the tiles and of their overlap, as the VAE calls them."""
    vae_slicing: bool = False
    """The VAE computes one image of a batch at a time."""
    checkpoint: Path | None = None
    """A file with the weights of several components, which go before those in the folder of the model."""
    components: tuple[tuple[str, Path], ...] = ()
    """By name, a file with the weights of a component, or a folder with its weights and its configuration, in place of
    the model's own."""
    trust_remote_code: bool = False
    """Code that comes with the model is run."""
    embeddings: tuple[EmbeddingFile, ...] = ()
    """Words that the text encoders are taught, of distinct tokens."""

    def given(self, component: str) -> Path | None:
        """The file or folder that is given for a component, None for none."""
        return dict(self.components).get(component)


DEFAULTS: Final = ModelOptions()
