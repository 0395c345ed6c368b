"""Find the weight files of a component, in every format that is served. Imports no torch.

Only safetensors and GGUF are read. Every other format is a pickle, or may be one, and can run code when it is read.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from triptych.engines.model_options import DEFAULTS, ModelOptions
from triptych.engines.stages import ModelError

_STEMS: Final = ("diffusion_pytorch_model", "model")
"""The names of weight files in diffusers and transformers."""
_NAME: Final = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)"
    r"(?:\.(?P<variant>[^.]+?))??"
    r"(?P<shard>-\d{5}-of-\d{5})?"
    r"(?:\.(?P<old_variant>(?:(?!-\d{5}-of-)[^.])+))??"
    r"\.safetensors"
)
_INDEX: Final = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model)\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json"
    r"|(?P<old_stem>diffusion_pytorch_model|model)\.safetensors\.(?P<old_variant>[^.]+)\.index\.json"
)
_UNSAFE: Final = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_OTHER: Final = frozenset({".msgpack", ".h5", ".onnx", ".flashpack"})


_DENOISERS: Final = ("unet", "transformer")
_PREFIXES: Final = {
    "vae": ("first_stage_model.", "vae."),
    "audio_vae": ("audio_vae.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.transformer.", "text_encoders.clip_l."),
    "text_encoder_2": (
        "conditioner.embedders.1.",
        "conditioner.embedders.0.model.",
        "text_encoders.clip_g.",
        "text_encoders.t5xxl.",
    ),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
"""The prefixes of tensor names by component, in files of several components (Stable Diffusion 1 to 3, Flux, LTX)."""
_OTHERS: Final = (
    *_PREFIXES["vae"],
    *_PREFIXES["audio_vae"],
    "cond_stage_model.",
    "conditioner.",
    "text_encoders.",
    "model_ema.",
    "vocoder.",
)
"""The prefixes of all components but the denoiser."""


class WeightFormat(StrEnum):
    """How the weights of a component are stored."""

    FOLDER = "folder"
    """As diffusers and transformers save them: one safetensors file, or shards with an index."""
    SINGLE_FILE = "single file"
    """One safetensors file, with tensor names of diffusers or of the model's authors."""
    GGUF = "gguf"
    """One file of quantized blocks, which compute in the serving dtype."""


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a component.

    Attributes:
        form: How the weights are stored.
        files: The files to read, in order; () if there are none.
        variant: The variant of the files, such as "fp16"; "" for plain files.
        variants: All variants in the folder, sorted; "" stands for plain files.
        index: The index of shards; None for one file.
        problem: Why there are no files and what to do, as the rest of a sentence; "" if there are.
    """

    form: WeightFormat = WeightFormat.FOLDER
    files: tuple[Path, ...] = ()
    variant: str = ""
    variants: tuple[str, ...] = ()
    index: Path | None = None
    problem: str = ""

    @property
    def note(self) -> str:
        """The file or variant to report; "" for plain files of the folder."""
        if self.form is not WeightFormat.FOLDER:
            return self.files[0].name
        return f'variant "{self.variant}"' if self.variant else ""


def component_files(name: str, folder: Path, options: ModelOptions = DEFAULTS) -> WeightFiles:
    """Find the weight files of a component of a model.

    Args:
        name: The name of the component in the pipeline.
        folder: The folder of the component, with its configuration and maybe its weights.
        options: The options of the topology.

    Returns:
        The files; none, with a `problem`, for a component without weights, such as a tokenizer.

    Raises:
        ModelError: The header of a checkpoint cannot be read.
    """
    given = options.given(name)
    if given is not None and not given.is_dir():
        return _single(given)
    if given is None and options.checkpoint is not None and in_checkpoint(name, _names_in(options.checkpoint)):
        return _single(options.checkpoint)
    return weight_files(given or folder, options.variant)


def read_ahead_files(name: str, folder: Path, options: ModelOptions) -> tuple[Path, ...]:
    """Return the files of a component to read ahead; a checkpoint is read ahead for the denoiser, most of its bytes."""
    files = component_files(name, folder, options).files
    return files if name in _DENOISERS or files != (options.checkpoint,) else ()


def component_folder(name: str, folder: Path, options: ModelOptions) -> Path:
    """Return the folder with the configuration of a component: the model's, unless the topology has another one."""
    given = options.given(name)
    return given if given is not None and given.is_dir() else folder


def check_components(index: Mapping[str, object], options: ModelOptions) -> None:
    """Check that the model has the components for which the topology has files.

    Raises:
        ModelError: It does not.
    """
    names = [name for name, entry in index.items() if isinstance(entry, list) and entry[:2] != [None, None]]
    for name, _ in options.components:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}."
            raise ModelError(
                f"[model.components] has {name}, which is not a component of {index['_class_name']}: {hint}"
            )


def in_checkpoint(name: str, keys: Collection[str]) -> bool:
    """Whether a file with the weights of several components has those of a component. Pure.

    Args:
        name: The name of the component in the pipeline.
        keys: The names of the tensors in the file; () for a GGUF file, which has only a denoiser.
    """
    if name in _DENOISERS:
        return not keys or any(not key.startswith(_OTHERS) for key in keys)
    return any(key.startswith(_PREFIXES.get(name, ())) for key in keys)


def _single(file: Path) -> WeightFiles:
    return WeightFiles(form=WeightFormat.GGUF if file.suffix == ".gguf" else WeightFormat.SINGLE_FILE, files=(file,))


def _names_in(checkpoint: Path) -> Collection[str]:
    if checkpoint.suffix == ".gguf":
        return ()
    try:
        with safe_open(checkpoint, framework="numpy") as file:
            return frozenset(file.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"The checkpoint {checkpoint} cannot be read: {error}.") from error


def weight_files(folder: Path, variant: str = "") -> WeightFiles:
    """Find the weight files in the folder of a component.

    Args:
        folder: The folder of the component; it need not exist.
        variant: The wanted variant; without it, plain files are used. "" stands for plain files, else for the only
            variant.

    Returns:
        The files, or why there are none. All shards of an index are listed, whether they exist or not.
    """
    try:
        names = sorted(entry.name for entry in folder.iterdir() if not entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return WeightFiles(problem="is not there: fetch it")
    found = _variants(names)
    chosen = choose_variant(found, variant)
    variants = tuple(sorted(found))
    if chosen is None:
        return WeightFiles(variants=variants, problem=_none_usable(names, variants, variant))
    listed = found[chosen]
    indexes = [name for name in listed if _INDEX.fullmatch(name)]
    whole = [name for name in listed if name not in indexes and "-of-" not in name]
    # If there are both, diffusers reads the shards, and transformers the single file.
    if whole and not (indexes and whole[0].startswith(_STEMS[0])):
        return WeightFiles(files=(folder / whole[0],), variant=chosen, variants=variants)
    if not indexes:
        problem = f"has parts of its weights ({listed[0]}), but not their index (*.safetensors.index.json)"
        return WeightFiles(variants=variants, problem=problem)
    index = indexes[0]
    try:
        shards = _shards(folder / index)
    except (OSError, ValueError) as error:
        return WeightFiles(variants=variants, problem=f"has an index {index} that cannot be read: {error}")
    return WeightFiles(
        files=tuple(folder / name for name in shards), variant=chosen, variants=variants, index=folder / index
    )


def choose_variant(there: Collection[str], wanted: str) -> str | None:
    """Return the variant of a component's files to read; None if it cannot be decided. Pure.

    Args:
        there: The variants of the component; "" stands for plain files.
        wanted: The variant of the topology; "" for none.
    """
    if wanted in there:
        return wanted
    if "" in there:
        return ""
    return next(iter(there)) if len(there) == 1 and not wanted else None


def _variants(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the files of each variant; those with the names of diffusers come before those of transformers."""
    found: dict[str, list[str]] = {}
    for name in names:
        if match := _NAME.fullmatch(name) or _INDEX.fullmatch(name):
            found.setdefault(match["variant"] or match["old_variant"] or "", []).append(name)
    return found


def _shards(index: Path) -> list[str]:
    content = json.loads(index.read_bytes())
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError("it has no weight_map")
    names = sorted(set(places.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"it names {name!r}, which is not a file of its folder")
    return names


def _none_usable(names: Collection[str], variants: Collection[str], wanted: str) -> str:
    if variants:
        have = " and ".join(f'"{variant}"' for variant in variants)
        if wanted:
            return f'has no variant "{wanted}" of its weights, but {have}: give one of them as [model] variant'
        return f"has its weights as the variants {have}: choose one with [model] variant"
    unsafe = [name for name in names if Path(name).suffix in _UNSAFE]
    if unsafe:
        return (
            f"has its weights as {unsafe[0]}, a pickle, which could run code and is never read: fetch the safetensors"
            " files of this model, or convert it with save_pretrained(FOLDER) on a machine where you trust it"
        )
    other = [name for name in names if Path(name).suffix in {*_OTHER, ".safetensors", ".gguf"}]
    if other:
        return f"has no {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors, but {other[0]}: rename or convert it"
    return f"has no {_STEMS[0]}.safetensors or {_STEMS[1]}.safetensors: fetch the weights of this component"
