"""The identity of a model: what tells it from other models, and from other versions of its files."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

import msgspec

from triptych.actors.topology._model_source import INDEX_FILES
from triptych.actors.topology.paths import OWNER_RECORD

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


_CONTENT: Final = frozenset({".json", ".safetensors", ".txt", ".model"})
_EXCLUDED_FILES: Final = frozenset({"triptych.json", OWNER_RECORD})
"""The serving config, whose defaults have been applied to what was accepted, and the record of a state folder."""
_SMALL: Final = 1 << 20
_SAMPLES: Final = 8
_SAMPLE_BYTES: Final = 4096


class ModelIdentity(msgspec.Struct, frozen=True):
    """What tells one model from another."""

    path: str
    """Its folder, absolute."""
    index: str
    """Digest of its index, which names its components."""
    content: str
    """Digest of its small files, and of the sizes and samples of its weight files."""
    cache: str = ""
    """The step cache of its denoisers, with which it makes other images; it is the same model all the same."""

    def is_same(self, other: ModelIdentity) -> bool:
        """Return whether it is the same model: a copy, or another version in its place (docs/adr/0026)."""
        return self.content == other.content or (self.path, self.index) == (other.path, other.index)


def identify_model(
    model: Path, checkpoint: Path | None = None, others: Sequence[Path] = (), cache: str = ""
) -> ModelIdentity | None:
    """Return the identity of a model, None if its folder is missing; blocks on the disk.

    Args:
        model: Its folder.
        checkpoint: The file with the weights, if they are not in the folder; it is then the model's path.
        others: Files and folders of components that replace the folder's own.
        cache: The step cache of its denoisers.

    Raises `OSError` for a file that cannot be read.
    """
    if not model.is_dir():
        return None
    index = hashlib.sha256()
    content = hashlib.sha256()
    for path in filter(None, (checkpoint, *others)):
        index.update(f"{path}\n".encode())
        _digest(path, [path] if path.is_file() else _content(path), content, index)
    _digest(model, _content(model), content, index)
    return ModelIdentity(str(checkpoint or model), index.hexdigest()[:32], content.hexdigest()[:32], cache)


def _content(model: Path) -> list[Path]:
    files = (file for pattern in ("*", "*/*") for file in model.glob(pattern))
    return sorted(
        file for file in files if file.suffix in _CONTENT and file.name not in _EXCLUDED_FILES and file.is_file()
    )


def _digest(model: Path, files: Sequence[Path], content: hashlib._Hash, index: hashlib._Hash) -> None:
    for file in files:
        size = file.stat().st_size
        content.update(f"{file.relative_to(model)} {size}\n".encode())
        with file.open("rb", buffering=0) as opened:
            if size <= _SMALL:
                data = opened.read()
                content.update(data)
                if str(file.relative_to(model)) in INDEX_FILES:
                    index.update(data)
                continue
            for k in range(_SAMPLES):
                opened.seek((size - _SAMPLE_BYTES) * k // (_SAMPLES - 1))
                content.update(opened.read(_SAMPLE_BYTES))
