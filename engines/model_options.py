"""How a model is read and cut: the options of a topology beside the folder of the model. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, TypeAlias

import msgspec

OptionValue: TypeAlias = bool | int | float | str | tuple[int | float, ...] | None


class ComponentOptions(msgspec.Struct, frozen=True):
    """A class and options that replace those of a component."""

    class_name: str = ""
    """The name of the class; "" for that of the model."""
    options: tuple[tuple[str, OptionValue], ...] = ()
    """Options by name that replace those of the model's configuration."""

    @classmethod
    def of(cls, table: Mapping[str, OptionValue]) -> ComponentOptions:
        """Make it from a table of a topology, in which `class` is the name of the class."""
        return cls(str(table.get("class", "")), tuple((name, table[name]) for name in sorted(table) if name != "class"))


class EmbeddingFile(msgspec.Struct, frozen=True):
    """A textual inversion that is loaded with a model: a token and its embeddings."""

    token: str
    """The token, as in prompts."""
    path: Path
    """A `.safetensors` file with its embeddings."""


class ModelOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of a model, the same for all of its processes; the defaults follow its files."""

    task: str | tuple[str, ...] = ""
    """A task, several, or "any", instead of those of the serving config; "" or () for those."""
    route: str = ""
    """The partition, "modular" or "classic", see `partition.strategy.PartitionStrategy`; "" for the best possible."""
    variant: str = ""
    """The variant of weight files, such as "fp16", for components that have it; see `weights.files.choose_variant`."""
    scheduler: ComponentOptions = ComponentOptions()
    """The default scheduler of requests."""
    guider: ComponentOptions = ComponentOptions()
    """The default of all guiders of requests."""
    vae_tiling: bool = False
    """Whether the VAE computes in tiles."""
    vae_tiling_options: tuple[tuple[str, OptionValue], ...] = ()
    """Sizes of the tiles and of their overlap, by the names of the VAE."""
    vae_slicing: bool = False
    """Whether the VAE computes one image of a batch at a time."""
    step_cache: str = ""
    """The step cache of the denoiser, as `step_cache_options.parse_step_cache` takes it; "" for none."""
    checkpoint: Path | None = None
    """A file with the weights of several components, which replace those in the model's folder."""
    components: tuple[tuple[str, Path], ...] = ()
    """Components by name with a file of their weights, or a folder of their weights and configuration, that replaces
    that of the model."""
    trust_remote_code: bool = False
    """Whether code in the model's folder may be run."""
    embeddings: tuple[EmbeddingFile, ...] = ()
    """The textual inversions to load, of distinct tokens."""

    def given(self, component: str) -> Path | None:
        """Return the file or folder that replaces a component, or None."""
        return dict(self.components).get(component)


DEFAULTS: Final = ModelOptions()
