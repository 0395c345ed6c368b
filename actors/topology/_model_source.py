"""Where the files of a model are: a folder, one file with all weights, or a repository in the cache of the hub.

Nothing is ever downloaded: if files are missing, the error names the command that downloads them.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from triptych.actors.topology.sections import ModelSection

INDEX_FILES: Final = ("model_index.json", "modular_model_index.json")
WEIGHT_SUFFIXES: Final = (".safetensors", ".gguf")
"""Suffixes of weight files whose format cannot run code."""
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*")
_REVISION: Final = re.compile(r"[A-Za-z0-9_./-]{1,128}")


class ModelSource(msgspec.Struct, frozen=True, kw_only=True):
    """Where the files of a model are, or why they cannot be found."""

    folder: Path
    """Absolute folder in the layout of diffusers: the index, configurations and tokenizers, and the weights that the
    files below do not have."""
    checkpoint: Path | None = None
    """Absolute file with the weights of several components, if the model is one."""
    components: dict[str, Path] = {}
    """Absolute file or folder of each component that replaces the model's own."""
    key: str = ""
    """The key of `[model]` that `problem` is about."""
    problem: str = ""
    """Why the model cannot be used on this machine; "" if nothing is missing. Its files are not read."""
    fix: str = ""
    """How to solve it."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All paths, the folder first."""
        others = (self.checkpoint, *(path for _, path in sorted(self.components.items())))
        return (self.folder, *(path for path in others if path is not None))


class _MissingError(Exception):
    """Files of a model are missing: what is wrong, and how to solve it."""

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.problem = problem
        self.fix = fix


def find_source(section: ModelSection, base: Path) -> ModelSource:
    """Find the files of a model; looks at the disk, but reads no file.

    Args:
        section: What the topology says of it.
        base: Folder that its paths are relative to.
    """
    resolved = absolute(base, section.path)
    key = "path"
    try:
        if resolved.is_file():
            _check_ending(resolved)
            key = "config"
            source = ModelSource(folder=_config(section, base), checkpoint=resolved)
        else:
            source = ModelSource(folder=_folder(section.path, base, section.revision))
            key = "config"
            _check_unused(section)
        key = "components"
        return msgspec.structs.replace(source, components=_components(section.components, base))
    except _MissingError as error:
        return ModelSource(folder=resolved, key=key, problem=error.problem, fix=error.fix)


def absolute(base: Path, path: str) -> Path:
    """Return the absolute path of a file or folder that a topology names.

    A link to a file is not followed: in the cache of the hub its target has a name without meaning.
    """
    resolved = base / Path(path).expanduser()
    return Path(os.path.abspath(resolved)) if resolved.is_file() else resolved.resolve()  # noqa: PTH100  follows no links


def snapshot(repository: str, revision: str = "") -> Path | None:
    """Return the folder of a repository in the local cache of the hub, None if it is missing; never uses the network.

    Args:
        repository: Its id, such as "stabilityai/sdxl-turbo".
        revision: A branch, tag or commit, "" for the main branch.
    """
    # Imported here because it is slow, and most topologies name folders.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def is_repository(path: str) -> bool:
    """Return whether a path could be the id of a repository. Pure."""
    return bool(_ID.fullmatch(path)) and ".." not in path


def _folder(path: str, base: Path, revision: str) -> Path:
    resolved = absolute(base, path)
    if resolved.is_dir():
        return resolved
    if resolved.exists() or not is_repository(path):
        problem = "is a file" if resolved.exists() else "does not exist"
        fix = (
            "give the folder of a model or a checkpoint, relative to the topology file or absolute, or the id of a"
            " repository in the cache of the hub"
        )
        raise _MissingError(f"{problem} ({resolved})", fix)
    if revision and not _REVISION.fullmatch(revision):
        raise _MissingError(f'has the revision "{revision}", which is not valid', "give a branch, a tag or a commit")
    found = snapshot(path, revision)
    if found is None:
        of = f" --revision {revision}" if revision else ""
        problem = f"is neither a folder here ({resolved}) nor a repository in the local cache of the hub"
        raise _MissingError(problem, f"run: hf download {path}{of} (nothing is downloaded while serving)")
    return found


def _config(section: ModelSection, base: Path) -> Path:
    if not section.config:
        problem = f"is missing: {section.path} has weights, but no configurations and no tokenizers"
        fix = (
            "give the folder or the repository of a model of the same kind in the layout of diffusers, without its"
            f" weights if you like; `triptych init {section.path}` says which"
        )
        raise _MissingError(problem, fix)
    folder = _folder(section.config, base, section.revision)
    if not any((folder / name).is_file() for name in INDEX_FILES):
        fix = f"give a folder with a {INDEX_FILES[0]}, as diffusers saves a pipeline"
        raise _MissingError(f"is not a model in the layout of diffusers ({folder})", fix)
    return folder


def _check_unused(section: ModelSection) -> None:
    if section.config:
        problem = f"is for a checkpoint in one file, which {section.path} is not"
        raise _MissingError(problem, "leave it out, or give the checkpoint as path")


def _components(written: Mapping[str, str], base: Path) -> dict[str, Path]:
    found = {}
    for name, path in written.items():
        resolved = absolute(base, path)
        if not resolved.exists():
            fix = "give a file or folder, relative to the topology file or absolute"
            raise _MissingError(f'has {name} = "{path}", which does not exist ({resolved})', fix)
        if resolved.is_file():
            _check_ending(resolved)
        found[name] = resolved
    return found


def _check_ending(file: Path) -> None:
    if file.suffix not in WEIGHT_SUFFIXES:
        fix = f"convert it to one that ends in {WEIGHT_SUFFIXES[0]}: no other format is read, since those can run code"
        raise _MissingError(f"is a file of another kind ({file})", fix)
