"""Check the files of a model, from its configuration and the headers of its weights.

Imports no torch and reads no weights, so it takes milliseconds for any size of model. `partition.compatibility` does
the checks that need the classes of components.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from triptych.engines.model_options import DEFAULTS, ModelOptions
from triptych.engines.parameters.lora import LoraFile
from triptych.engines.parameters.serving_config import INDEX_NAMES, SERVING_CONFIG_NAME, load_index, load_serving_config
from triptych.engines.stages import ModelError
from triptych.engines.weights.files import WeightFiles, component_files, component_folder

__all__ = [
    "ComponentEntry",
    "Finding",
    "HeaderError",
    "TensorHeader",
    "component_entries",
    "inspect_files",
    "read_header",
    "read_headers",
]

UNTRUSTED: Final = "such code is not run without [model] trust_remote_code = true"
_POINTER: Final = b"version https://git-lfs"
_LENGTH: Final = 8
"""The bytes at the start of a safetensors file that are the length of its header."""
_LONGEST_HEADER: Final = 100_000_000
"""The limit of the library, in bytes."""
_METADATA: Final = "__metadata__"
_BITS: Final[Mapping[str, int]] = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    "F4": 4,
}
_CONFIGS: Final[Mapping[str, tuple[str, ...]]] = {
    "Scheduler": ("scheduler_config.json",),
    "Tokenizer": ("tokenizer_config.json", "tokenizer.json"),
    "Processor": ("processor_config.json", "preprocessor_config.json"),
    "FeatureExtractor": ("preprocessor_config.json",),
}
"""The files of components without weights, by a word in the names of their classes; one of them must exist."""
_VOCABULARIES: Final = ("tokenizer.json", "vocab.json", "vocab.txt", "vocab.model", "tokenizer.model", "spiece.model")
_WITHOUT_VOCABULARY: Final = ("ByT5Tokenizer",)
_PACKAGES: Final[Mapping[str, str]] = {
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "torchao": "torchao",
    "quanto": "optimum.quanto",
    "gguf": "gguf",
    "modelopt": "modelopt",
    "awq": "awq",
    "gptq": "gptqmodel",
    "compressed-tensors": "compressed_tensors",
}
"""The package for a quantization method, as it is imported."""
_MADE_WITH: Final[Mapping[str, str]] = {"diffusers": "_diffusers_version", "transformers": "transformers_version"}


class Finding(msgspec.Struct, frozen=True):
    """A problem with a model."""

    where: str
    """A component, a LoRA, the index or the serving config."""
    problem: str
    """One sentence, with what to do."""
    fatal: bool = True
    """Whether the model cannot be served; otherwise it can, but maybe not as intended."""


class TensorHeader(msgspec.Struct, frozen=True):
    """A tensor, as described in the header of its file."""

    dtype: str
    """The dtype in safetensors, such as "BF16"."""
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * _BITS.get(self.dtype, 32) // 8


class ComponentEntry(msgspec.Struct, frozen=True):
    """A component in the index of a model."""

    name: str
    library: str
    class_name: str
    folder: Path

    @property
    def has_weights(self) -> bool:
        """Whether the component has weights, by the name of its class."""
        # Some autoencoders of diffusers have "Tokenizer" in their names.
        known = self.library == "transformers" or self.class_name.endswith("Scheduler")
        return not (known and any(word in self.class_name for word in _CONFIGS))


class HeaderError(Exception):
    """A safetensors file cannot be read; the message is the rest of a sentence about the file."""


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Read the header of a safetensors file, and check the size of the file.

    Returns:
        The tensors by name.

    Raises:
        HeaderError: The file is a pointer of git-lfs, is truncated, or is not such a file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_LENGTH)
            if start and _POINTER.startswith(start):
                raise HeaderError("is a pointer of git-lfs, not the file itself: run git lfs pull in its folder")
            length = int.from_bytes(start, "little")
            if size < _LENGTH or length > min(size - _LENGTH, _LONGEST_HEADER):
                raise HeaderError("is truncated or not a safetensors file: fetch it again")
            tensors, end = _parse_header(file.read(length))
    except OSError as error:
        raise HeaderError(f"cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise HeaderError("has a header that cannot be read: fetch it again") from error
    if _LENGTH + length + end > size:
        raise HeaderError(f"is truncated: it has {size:,} of {_LENGTH + length + end:,} bytes, fetch it again")
    return tensors


def _parse_header(header: bytes) -> tuple[dict[str, TensorHeader], int]:
    """Return the tensors of a header, and the bytes of all of them."""
    told = json.loads(header)
    if not isinstance(told, dict):
        raise ValueError("it is no object")  # noqa: TRY004  as for any other wrong header
    tensors = {
        str(name): TensorHeader(str(found["dtype"]), tuple(int(side) for side in found["shape"]))
        for name, found in told.items()
        if name != _METADATA
    }
    ends = [int(found["data_offsets"][1]) for name, found in told.items() if name != _METADATA]
    return tensors, max(ends, default=0)


def read_headers(files: WeightFiles) -> tuple[dict[str, TensorHeader], list[str]]:
    """Read the headers of all files of a component, and compare them with the index of shards.

    Returns:
        The tensors by name, and the problems of files, as sentences without a full stop.
    """
    tensors: dict[str, TensorHeader] = {}
    problems = []
    broken = set()
    for path in files.files:
        if not path.exists():
            broken.add(path.name)
            of = f"which {files.index.name} names, " if files.index else ""
            problems.append(f"{path.name}, {of}is missing: fetch it")
            continue
        try:
            tensors.update(read_header(path))
        except HeaderError as error:
            broken.add(path.name)
            problems.append(f"{path.name} {error}")
    if files.index is not None:
        places = json.loads(files.index.read_bytes())["weight_map"]
        lost = sorted(name for name, place in places.items() if place not in broken and name not in tensors)
        if lost:
            problems.append(
                f"{files.index.name} names {summarize_names(lost)}, which no shard has: fetch all of them again"
            )
    return tensors, problems


def component_entries(
    model: Path, index: Mapping[str, object], options: ModelOptions = DEFAULTS
) -> tuple[ComponentEntry, ...]:
    """Return the components in an index, without those that are null."""
    found = []
    for name, value in index.items():
        if not isinstance(value, list) or len(value) not in (2, 3):
            continue
        library, class_name = value[:2]
        if not isinstance(library, str) or not isinstance(class_name, str):
            continue
        folder = model / name
        if len(value) == 3 and isinstance(value[2], dict):
            # A modular index has the source of a component: another model's folder, mostly on the hub.
            source, subfolder = (value[2].get(key) for key in ("pretrained_model_name_or_path", "subfolder"))
            folder = Path(source or model) / (name if subfolder is None else subfolder)
        found.append(ComponentEntry(name, library, class_name, component_folder(name, folder, options)))
    return tuple(found)


def inspect_files(model: Path, options: ModelOptions = DEFAULTS, loras: tuple[LoraFile, ...] = ()) -> list[Finding]:
    """Check the files of a model, as far as possible without the classes of its components.

    Args:
        model: The folder of the model.
        options: The options of the topology.
        loras: The adapters of the model.

    Returns:
        All findings, in the order of the index.
    """
    if not options.trust_remote_code and (custom := _custom_pipeline(model)):
        return [custom]
    try:
        index = load_index(model)
    except ModelError as error:
        return [Finding("index", str(error))]
    found = list(_config_findings(model))
    for entry in component_entries(model, index, options):
        found += _component_findings(entry, options)
    for lora in loras:
        found += _lora_findings(lora)
    return found


def _custom_pipeline(model: Path) -> Finding | None:
    path = next((model / name for name in INDEX_NAMES if (model / name).is_file()), None)
    try:
        named = json.loads(path.read_bytes()).get("_class_name") if path else None
    except (OSError, ValueError, AttributeError):
        return None  # `load_index` reports it
    if not isinstance(named, list):
        return None
    what = ".".join(str(part) for part in named)
    return Finding("index", f"The pipeline is code that came with the model ({what}): {UNTRUSTED}.")


def _config_findings(model: Path) -> Iterator[Finding]:
    try:
        load_serving_config(model)
    except ModelError as error:
        if SERVING_CONFIG_NAME in str(error):  # an error about a tokenizer is reported with that component
            yield Finding("serving config", str(error))


def _component_findings(entry: ComponentEntry, options: ModelOptions) -> Iterator[Finding]:
    if not entry.folder.is_dir():
        yield Finding(entry.name, f"The {entry.name} has no folder {entry.folder}: fetch the whole model.")
        return
    files = sorted(path for path in entry.folder.glob("*") if path.is_file())
    broken = [f"has a {path.name} that {problem}" for path in files if (problem := _text_problem(path))]
    if broken:  # problems that follow from these files would be repeated
        problems = [(problem, True) for problem in broken]
    elif not entry.has_weights:
        problems = [(problem, True) for problem in _weightless_problems(entry)]
    else:
        problems = list(_weights_problems(entry, options))
    for problem, fatal in problems:
        yield Finding(entry.name, f"The {entry.name} in {entry.folder} {problem}.", fatal)


def _weights_problems(entry: ComponentEntry, options: ModelOptions) -> Iterator[tuple[str, bool]]:
    """Yield problems, as the rest of a sentence, and whether each is fatal."""
    config = config_of(entry.folder)
    if config is None and any(entry.folder.glob("*_config.json")):
        return  # it is a guider or processor, not a model
    if config is None:
        yield "has no config.json: fetch the configuration of this component", True
        return
    if "auto_map" in config:
        yield "names code that came with the model (auto_map), which is never run", False
    if problem := _package_problem(config):
        yield problem, True
    try:
        files = component_files(entry.name, entry.folder, options)
    except ModelError as error:
        yield f"cannot be read: {error}", True
        return
    if files.problem:
        yield files.problem, True
    elif all(path.suffix == ".safetensors" for path in files.files):
        for problem in read_headers(files)[1]:
            yield f"is damaged: {problem}", True


def config_of(folder: Path) -> dict[str, object] | None:
    """Return the configuration in a component's folder, {} if it is not an object; None if there is none."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        return None
    return config if isinstance(config, dict) else {}


def _text_problem(path: Path) -> str:
    """Say what is wrong with a file that is not weights; "" if nothing is."""
    if path.suffix not in (".json", ".txt", ".model"):
        return ""
    try:
        content = path.read_bytes()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if content.startswith(_POINTER):
        return "is a pointer of git-lfs, not the file itself: run git lfs pull in its folder"
    if path.suffix != ".json":
        return "" if content else "is empty: fetch it again"
    try:
        json.loads(content)  # accepts infinity and other numbers that are not JSON, as the libraries do
    except ValueError as error:
        return f"is not JSON ({error}): fetch it again"
    return ""


def _weightless_problems(entry: ComponentEntry) -> Iterator[str]:
    names = {path.name for path in entry.folder.iterdir()}
    wanted = next(files for word, files in _CONFIGS.items() if word in entry.class_name)
    if not names & set(wanted):
        yield f"has no {' or '.join(wanted)}: fetch it"
    elif "Tokenizer" in entry.class_name and not any(
        name in _VOCABULARIES or name.endswith(".model") or entry.class_name in _WITHOUT_VOCABULARY for name in names
    ):
        yield f"has no vocabulary, such as {_VOCABULARIES[0]}, {_VOCABULARIES[1]} or {_VOCABULARIES[-1]}: fetch it"


def _package_problem(config: Mapping[str, object]) -> str:
    section = config.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    package = _PACKAGES.get(str(method), "")
    if not package or _is_installed(package):
        return ""
    return f"is quantized by {method}, which needs the package {package.replace('.', '-')}: install it"


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False


def _lora_findings(lora: LoraFile) -> Iterator[Finding]:
    for given in (lora.path, lora.path_2):
        if given is None:
            continue
        found = sorted(given.glob("*.safetensors")) if given.is_dir() else [given]
        if len(found) != 1:
            yield Finding(f"LoRA {lora.name}", f"The LoRA folder {given} has {len(found)} .safetensors files, not one.")
            continue
        try:
            tensors = read_header(found[0])
        except HeaderError as error:
            yield Finding(f"LoRA {lora.name}", f"The LoRA {found[0]} {error}.")
            continue
        if not tensors:
            yield Finding(f"LoRA {lora.name}", f"The LoRA {found[0]} is empty: fetch it again.")


def class_problem(entry: ComponentEntry, has: frozenset[str], version: str, written_by: str = "") -> str:
    """Return the message for a component whose class its library does not have. Pure.

    Args:
        entry: The component.
        has: The names of the classes in the library; empty if the library is neither diffusers nor transformers.
        version: The installed version of the library.
        written_by: The version of the library that wrote the component's configuration; "" if unknown.
    """
    what = f"The {entry.name} is a {entry.class_name} of {entry.library}"
    if not has:
        return f"{what}, which is code that came with the model: {UNTRUSTED}."
    needs = f" The model was made with {entry.library} {written_by}." if _is_newer(written_by, version) else ""
    close = difflib.get_close_matches(entry.class_name, sorted(has), n=1, cutoff=0.8)
    hint = f" Did you mean {close[0]}?" if close and not needs else ""
    return f"{what}, and {entry.library} {version} has no such class.{needs}{hint}"


def library_version_of(entry: ComponentEntry) -> str:
    """Return the version of the library that wrote the configuration of a component; "" if unknown."""
    config = config_of(entry.folder) if entry.folder.is_dir() else None
    value = (config or {}).get(_MADE_WITH.get(entry.library, ""))
    return value if isinstance(value, str) else ""


def _is_newer(one: str, other: str) -> bool:
    return bool(one) and _numbers(one) > _numbers(other)


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split(".")[:3]
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in parts)


def summarize_names(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
